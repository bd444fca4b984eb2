"""Launch configurations of the fused GEMMs: they fit every device and every real shape, and read what was measured."""

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")
from slicegpt.bench.models.shapes import MODELS, SIZES, NormLinearShape, launches
from slicegpt.kernels import gemm_config
from slicegpt.kernels.gemm_config import (
    DeviceClass,
    candidates,
    fits,
    nearest_tuned,
    norm_linear_config,
    predicted_cycles,
    rotate_add_config,
    tuned_entry,
    tuned_table,
)

# Shared memory that one block may have: the CUDA programming guide's table of technical specifications.
DEVICES = {
    "A100": DeviceClass((8, 0), 108, 163 * 1024),
    "RTX 3090": DeviceClass((8, 6), 82, 99 * 1024),
    "RTX 4090": DeviceClass((8, 9), 128, 99 * 1024),
    "H100": DeviceClass((9, 0), 132, 227 * 1024),
    "B200": DeviceClass((10, 0), 148, 227 * 1024),
    "RTX 5090": DeviceClass((12, 0), 170, 99 * 1024),
}
OPS = ("norm_linear", "norm_linear_gated", "rotate_add", "rotate_add_dense")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = (1, 4, 16, 17, 512, 8192)


def chosen(device, dtype, rows, launch):
    if isinstance(launch, NormLinearShape):
        gated = launch.activation.endswith("_gated")
        return norm_linear_config(device, dtype, rows, launch.columns, launch.inner, gated)
    return rotate_add_config(device, dtype, rows, launch.columns, launch.total_inner, launch.dense)


@pytest.mark.parametrize("name", DEVICES)
def test_every_real_shape_has_a_configuration_that_fits(name):
    device = DEVICES[name]
    configs = {
        (dtype, chosen(device, dtype, rows, launch))
        for model in MODELS
        for size in SIZES
        for launch in launches(model, *size)
        for dtype in DTYPES
        for rows in ROWS
    }
    for dtype, config in configs:
        assert fits(config, device, dtype), (config, dtype)
        assert config.programs_per_sm * config.num_warps <= 8, (
            "two programs of 4 warps, or one of 8, have 255 registers"
        )
        assert config.tma == (device.capability >= (9, 0))
    assert len(configs) > 3, "prefill and a single row do not want the same tiles"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEVICES)
def test_candidates_suit_the_kernels(name, dtype):
    for config in candidates(DEVICES[name], dtype):
        # Powers of two; sums of squares cover 32 columns; a product needs 16 columns; 2 stages would not overlap.
        sizes = (config.block_m, config.block_n, config.block_k)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert config.block_m >= 16
        assert config.block_n >= 32
        assert config.block_k * dtype.itemsize >= 128
        assert config.num_stages >= 3
        # a box of TMA has at most 256 rows
        assert max(config.block_m, config.block_n) <= 256


def test_the_model_prefers_what_it_should():
    device = DEVICES["H100"]
    single = norm_linear_config(device, torch.bfloat16, 1, 13312, 3072, False)
    prefill = norm_linear_config(device, torch.bfloat16, 8192, 13312, 3072, False)
    assert single.block_m == 16
    assert prefill.block_m * prefill.block_n == 128 * 256
    # Few columns and rows: narrow tiles, so that most processors have work.
    narrow = rotate_add_config(device, torch.bfloat16, 32, 3072, 5120, False)
    assert 3072 // narrow.block_n >= 90
    # More rows, columns or inner columns never take less time.
    sizes = (512, 3072, 5120)
    base = predicted_cycles(prefill, device, torch.bfloat16, *sizes)
    for index in range(3):
        larger = [2 * size if i == index else size for i, size in enumerate(sizes)]
        assert predicted_cycles(prefill, device, torch.bfloat16, *larger) >= base


def test_what_was_measured_decides_nearby(tmp_path, monkeypatch):
    device = DEVICES["H100"]
    options = candidates(device, torch.bfloat16)
    entries = [
        tuned_entry("rotate_add_dense", torch.bfloat16, 8192, 3072, 14080, options[1]),
        tuned_entry("rotate_add_dense", torch.bfloat16, 512, 3072, 14080, options[2]),
        tuned_entry("rotate_add", torch.bfloat16, 8192, 3072, 14080, options[3]),
    ]
    file = tmp_path / "tuned_sm90.json"
    file.write_text(json.dumps({"device": "test", "entries": entries}))
    monkeypatch.setattr(gemm_config, "tuned_file", lambda capability: file)
    tuned_table.cache_clear()
    try:
        table = tuned_table(device.capability)
    finally:
        tuned_table.cache_clear()

    def nearest(op, rows, columns=3072, inner=14080, dtype=torch.float16, device=device):
        return nearest_tuned(table, device, dtype, op, rows, columns, inner)

    assert nearest("rotate_add_dense", 8192) == options[1]
    assert nearest("rotate_add_dense", 6000) == options[1]
    assert nearest("rotate_add_dense", 600) == options[2]
    assert nearest("rotate_add", 8192) == options[3]
    assert nearest("norm_linear", 8192) is None
    assert nearest("rotate_add_dense", 8192, dtype=torch.float32) is None
    assert nearest("rotate_add_dense", 64) is None, "an eighth of the rows is not near"
    assert nearest("rotate_add_dense", 8192, columns=28672) is None
    small = replace(device, shared_bytes=99 * 1024)
    assert nearest("rotate_add_dense", 8192, device=small) is None, "what does not fit is not taken"


def test_tuned_files_are_valid():
    """What is committed: known operators, configurations that fit, and where they were measured."""
    for name, device in DEVICES.items():
        file = gemm_config.tuned_file(device.capability)
        if not file.exists():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["device"], name
        assert content["versions"]["triton"]
        assert content["date"]
        for op, dtype, rows, columns, inner, config in tuned_table(device.capability):
            assert op in OPS
            assert min(rows, columns, inner) > 0
            assert fits(config, device, getattr(torch, dtype)), asdict(config)
