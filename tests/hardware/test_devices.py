"""The facts that choose implementations agree with the roofline table of the benchmarks."""

import pytest

from slicegpt.bench.kernels.bench_gram import closing_table
from slicegpt.bench.models.devices import DEVICES, device_named, device_of_product
from slicegpt.hardware.devices import FP64_TENSOR_CORES, RATES


@pytest.mark.parametrize(
    "device", [device_named(name) for name in ("B200", "H100 SXM", "A100 80GB", "RTX 4090")]
)
def test_rates_agree(device):
    rates = RATES[device.capability]
    assert (rates.fp64_tflops, rates.int8_tops) == (device.fp64, device.int8)
    assert rates.bandwidth_tbs == pytest.approx(device.bandwidth / 1000)


def test_float64_tensor_cores_show_in_the_rates():
    for device in DEVICES:
        assert (device.capability in FP64_TENSOR_CORES) == (device.fp64 >= device.fp32 / 2)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", None),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_products_are_recognised(product, name):
    device = device_of_product(product)
    assert (device.name if device else None) == name


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
