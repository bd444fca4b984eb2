"""The predictions that the benchmark of `gram_` prints."""

import pytest

from slicegpt.bench.kernels.bench_gram import closing_table
from slicegpt.bench.models.devices import device_named


def test_predictions_are_marked_and_follow_the_roofline():
    table = closing_table(None, [])
    assert {row["device"] for row in table} >= {
        "H100 SXM",
        "H200",
        "A100 80GB",
        "Quadro RTX 6000",
        "RTX 4090",
    }
    measured = [value for row in table for name, value in row.items() if "measured" in name]
    assert set(measured) == {"not measured"}
    h200 = next(row for row in table if row["device"] == "H200")
    # N·D² operations of a triangle at 66.9 TFLOP/s
    assert h200["gram_ fp64: predicted ms"] == pytest.approx(2**18 * 4096**2 / 66.9e9, abs=0.1)
    rows = [{"D": 4096, "N": 1 << 18, "X": "float16", "method": "gram_ fp64", "ms": 80.0}]
    assert closing_table(device_named("H200"), rows)[0]["gram_ fp64: measured ms"] == 80.0
