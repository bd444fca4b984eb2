"""What kernels should take: the arithmetic of the predictions, and that they are near what bytes and rates allow."""

import pytest
import torch

from slicegpt.bench.models import kernel_times
from slicegpt.bench.models.kernel_times import CODE, Ceilings, MachineCode, decode_seconds, token_seconds
from slicegpt.bench.models.shapes import launches

MEASURED = {
    "copy, GB/s": 4000.0,
    "int8 product, TOP/s": 1500.0,
    "bfloat16 product, TFLOP/s": 750.0,
    "float64 product, TFLOP/s": 60.0,
}
DEVICE = Ceilings.of(MEASURED)


def test_ceilings_need_every_figure():
    assert DEVICE.copy == 4e12
    assert Ceilings.of({**MEASURED, "copy, GB/s": None}) is None
    assert Ceilings.of({}) is None


@pytest.mark.parametrize(
    ("code", "blocks"),
    [
        (MachineCode(64, 512, 14_336), 2),  # 65536 / (64 * 512)
        (MachineCode(65, 512, 14_336), 1),  # registers go in eights: 72
        (MachineCode(32, 64, 100 * 1024), 2),  # shared memory: 227 KB / 101 KB
        (MachineCode(32, 1024), 2),  # 64 warps
    ],
)
def test_occupancy(code, blocks):
    assert code.blocks == blocks


def test_decode_kernels_hold_two_blocks_and_gram_kernels_one():
    assert {name: code.blocks for name, code in CODE.items()} == {
        "gram_fp64": 1, "gram_exact": 1, "gram_exact, wgmma": 1, "norm_linear": 2, "rotate_add": 2,
    }  # fmt: skip


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_a_launch_takes_its_bytes_and_little_more(fraction):
    """Llama-2-7B's MLP: the bytes at the copy rate, and a few microseconds for what happens once."""
    for launch in launches("llama-2-7b", fraction, "compact" if fraction else "identity")[2:]:
        least = kernel_times.weight_bytes(launch) / DEVICE.copy
        assert least < decode_seconds(launch, 1, DEVICE) < least + 4e-6
        assert decode_seconds(launch, 1, DEVICE) < decode_seconds(launch, 1, DEVICE, overlap=False)


def test_few_bytes_in_flight_are_slow():
    """A product so small that 8 blocks have all of it does not reach the copy rate (Little's law)."""
    launch = launches("smollm2-135m", 0.0, "identity")[1]
    config = kernel_times.decode_config(launch, 1, DEVICE)
    warps = config.tiles(launch.columns) * config.split_k * config.row_warps * config.column_warps
    in_flight = warps * kernel_times.BYTES_IN_FLIGHT
    assert in_flight / kernel_times.LATENCY < DEVICE.copy
    slow = kernel_times.weight_bytes(launch) / (in_flight / kernel_times.LATENCY)
    assert decode_seconds(launch, 1, DEVICE) >= slow


def test_a_token_is_between_the_copy_rate_and_twice_that():
    dense, sliced = (
        token_seconds(launches("llama-2-7b", f, s), 32, 2 * 32000 * 4096, 0, DEVICE)
        for f, s in ((0.0, "identity"), (0.25, "compact"))
    )
    # 13.2 GB and 10.3 GB in docs/benchmarks.md.
    assert 13.2e9 / 4e12 < dense < 2 * 13.2e9 / 4e12
    assert 10.0e9 / 4e12 < sliced < dense
    serial = token_seconds(launches("llama-2-7b", 0.0, "identity"), 32, 2 * 32000 * 4096, 0, DEVICE, False)
    assert serial > dense


def test_covariances():
    """The triangle is half of the full product; conversions that nothing hides are 48 of 128 cycles more."""
    tokens, columns = 1 << 18, 4096
    full = 2 * tokens * columns**2 / DEVICE.float64
    hidden = kernel_times.float64_seconds(tokens, columns, DEVICE)
    assert hidden / full == pytest.approx(0.5 * (1 + 128 / columns))
    exposed = kernel_times.float64_seconds(tokens, columns, DEVICE, interleaved=False)
    assert exposed / hidden == pytest.approx(176 / 128)
    by_mma, by_wgmma = (
        kernel_times.exact_seconds(tokens, columns, torch.bfloat16, DEVICE, kernel)
        for kernel in ("mma", "wgmma")
    )
    assert by_wgmma < by_mma < full
    more = kernel_times.exact_seconds(tokens, columns, torch.bfloat16, DEVICE, "wgmma", planes=12)
    assert more > by_wgmma
    names = ("gram_ fp64", "gram_ exact", "gram_ exact, wgmma-pairs", "gram_ fast", "published")
    found = [kernel_times.gram_seconds(tokens, columns, torch.bfloat16, name, DEVICE) for name in names]
    assert all(found[:4])
    assert found[4] is None
