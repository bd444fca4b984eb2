"""The table of predictions, and that every figure of bench/gpu.sh finds its own beside it."""

import pytest

from slicegpt.bench.commands import expected, gpu_summary
from slicegpt.bench.models.devices import device_named
from slicegpt.bench.models.kernel_times import Ceilings, Heads, attention_seconds, product_seconds
from slicegpt.bench.models.network_times import layer_seconds, step_seconds
from slicegpt.bench.models.shapes import launches
from slicegpt.table import write_json

MEASURED = {
    "copy, GB/s": 4000.0,
    "int8 product, TOP/s": 1500.0,
    "bfloat16 product, TFLOP/s": 750.0,
    "float64 product, TFLOP/s": 60.0,
}


@pytest.mark.parametrize("device", ["h200", "h100", "a100-80", "rtx-6000"])
def test_nothing_of_the_table_is_measured(device, capsys):
    expected.main(["--device", device, "--slice", "0.25"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert all(row.endswith(expected.NOT_MEASURED) for row in rows)
    named = "\n".join(rows)
    for kind in ("gram_ exact", "8192 rows", "a layer", "a token", "throughput", "decode attention"):
        assert kind in named
    assert ("wgmma" in named) == (device in ("h200", "h100"))


def result(benchmark: str, row: dict, **settings) -> dict:
    return {
        "benchmark": benchmark,
        "environment": {"device": "NVIDIA H200"},
        "settings": {"shape": "llama-2-7b", "shortcut": "compact", **settings},
        "ceilings": MEASURED,
        "rows": [row],
    }


NETWORK = {"network": "25 %", "engine": "fused", "slice": 0.25, "dtype": "bfloat16"}
GEMM = {
    "model": "llama-2-7b",
    "slice": "25 %",
    "shortcut": "compact",
    "part": "mlp in",
    "method": "fused",
    "T": 8192,
}
RESULTS = {
    "token": result(
        "token", NETWORK | {"batch": 1, "ms_median": 3.0, "gigabytes_per_second": 3e3}, prompt=16, tokens=128
    ),
    "throughput": result("throughput", NETWORK | {"batch": 512, "tokens_per_second": 3e4}, seqlen=128),
    "layers": result("layers", NETWORK | {"variant": "25 %, fused", "layer_ms": 1.0}, batch=1, seqlen=2048),
    "rotation": result("rotation", GEMM | {"cold us": 2e3, "GB/s": 1.0, "TFLOP/s": 500.0}),
    "attention": result(
        "decode attention",
        {
            "model": "llama-2-70b",
            "batch": 16,
            "tokens": 2048,
            "dtype": "bfloat16",
            "by": "triton",
            "GB/s": 3e3,
        }
        | {"µs a layer": 100.0},
    ),
}


def test_predictions_stand_beside_figures(tmp_path):
    for name, content in RESULTS.items():
        write_json(tmp_path / f"{name}.json", content)
    found = {line["step"]: line["predicted"] for line in gpu_summary.lines(tmp_path)}
    device = Ceilings.of(MEASURED, device_named("h200"))
    mlp = launches("llama-2-7b", 0.25, "compact")[2]
    step = 512 / step_seconds("llama-2-7b", 0.25, 512, 64, 128, device)
    assert found == {
        "token": f"{1e3 * step_seconds('llama-2-7b', 0.25, 1, 80, 144, device):.4g} ms",
        "throughput": f"{step:.4g} tokens/s",
        "layers": f"{1e3 * layer_seconds('llama-2-7b', 0.25, 1, 2048, device):.4g} ms",
        "rotation": f"{1e6 * product_seconds(mlp, 8192, device):.4g} µs",
        "attention": f"{1e6 * attention_seconds(Heads(64, 8, 128), 16, 2048, 4096, device):.4g} µs",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"environment": {"device": "NVIDIA L4"}},
        {"ceilings": None},
        {"settings": {"shape": None, "seqlen": 128}},
    ],
)
def test_nothing_is_predicted_without_what_it_takes(tmp_path, change):
    write_json(tmp_path / "throughput.json", RESULTS["throughput"] | change)
    (line,) = gpu_summary.lines(tmp_path)
    assert line["predicted"] is None
    assert line["figure"] == "3e+04 tokens/s"
