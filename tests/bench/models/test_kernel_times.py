"""What kernels, layers and tokens should take: the arithmetic, and that it is near what bytes and rates allow."""

import pytest
import torch

from slicegpt.bench.models import kernel_times, network_times
from slicegpt.bench.models.devices import DEVICES, device_named
from slicegpt.bench.models.kernel_times import (
    CODE,
    Ceilings,
    Heads,
    MachineCode,
    attention_seconds,
    cache_bytes,
    decode_seconds,
    product_seconds,
)
from slicegpt.bench.models.network_times import layer_seconds, step_seconds
from slicegpt.bench.models.processors import PROCESSORS, processor_of
from slicegpt.bench.models.shapes import launches
from slicegpt.errors import SliceGPTError

MEASURED = {
    "copy, GB/s": 4000.0,
    "int8 product, TOP/s": 1500.0,
    "bfloat16 product, TFLOP/s": 750.0,
    "float64 product, TFLOP/s": 60.0,
}
H200 = device_named("h200")
DEVICE = Ceilings.of(MEASURED, H200)
PAPER = {one.name: Ceilings.on_paper(one) for one in DEVICES if one.capability in PROCESSORS}


def test_ceilings_need_every_figure():
    assert DEVICE.copy == 4e12
    assert Ceilings.of({**MEASURED, "copy, GB/s": None}, H200) is None
    assert Ceilings.of({}, H200) is None


@pytest.mark.parametrize(
    ("name", "clock"),
    [("H200", 1.83e9), ("H100 SXM", 1.83e9), ("A100 80GB", 1.41e9), ("Quadro RTX 6000", 1.77e9)],
)
def test_clocks_are_those_of_the_data_sheets(name, clock):
    """Boost clocks, from the rates: products in a cycle of a multiprocessor times their number."""
    assert PAPER[name].clock == pytest.approx(clock, rel=0.005)


def test_nothing_is_predicted_for_other_processors():
    with pytest.raises(SliceGPTError, match=r"capability: predictions are made for 7\.5, 8\.0, 9\.0, got"):
        processor_of((12, 0))


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
        "decode_attention": 4, "decode_attention, 16 warps": 1, "decode_attention, group": 3,
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
    dense, sliced = (step_seconds("llama-2-7b", f, 1, 0, 64, DEVICE) for f in (0.0, 0.25))
    # 13.2 GB and 10.3 GB in docs/benchmarks.md.
    assert 13.2e9 / 4e12 < dense < 2 * 13.2e9 / 4e12
    assert 10.0e9 / 4e12 < sliced < dense
    assert step_seconds("llama-2-7b", 0.0, 1, 0, 64, DEVICE, overlap=False) > dense


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize(("rows", "least"), [(512, 0.35), (8192, 0.55)])
def test_products_of_many_rows_are_near_the_library(name, rows, least):
    """Neither faster than the library's rate allows, nor slower than a third of it; more of it with more rows."""
    device, dtype = PAPER[name], torch.float16
    for launch in (one for size in (0.0, 0.25) for one in launches("llama-2-7b", size, "compact")):
        inner = launch.inner if hasattr(launch, "n_scaled") else launch.total_inner
        floor = 2 * rows * launch.columns * inner / device.bfloat16
        assert floor < product_seconds(launch, rows, device, dtype=dtype) < floor / least


def test_turing_pays_for_float32_products_that_go_through_memory():
    launch, rows = launches("llama-2-7b", 0.0, "identity")[2], 4096
    device = PAPER["Quadro RTX 6000"]
    operations = 2 * rows * launch.columns * launch.inner / device.bfloat16
    written_and_read = 2 * 4 * rows * launch.columns / device.copy
    assert product_seconds(launch, rows, device) > operations + written_and_read


LLAMA, GROUPED = Heads(32, 32, 128), Heads(64, 8, 128)


@pytest.mark.parametrize("heads", [LLAMA, GROUPED])
@pytest.mark.parametrize("name", PAPER)
def test_attention_reads_the_cache_or_what_is_on_its_way(heads, name):
    device = PAPER[name]
    short = attention_seconds(heads, 1, 0, 64, device)
    long = attention_seconds(heads, 16, 16384, 32768, device)
    least = cache_bytes(heads, 16, 16384) / device.copy
    assert 0.999 * least < long - short < 2.5 * least


@pytest.mark.parametrize("heads", [LLAMA, GROUPED])
def test_a_short_cache_of_one_sequence_does_not_fill_the_device(heads):
    """32 or 8 programs wait for what they have on its way (Little's law)."""
    few = attention_seconds(heads, 1, 128, 256, DEVICE) - attention_seconds(heads, 1, 0, 256, DEVICE)
    assert few > 1.2 * cache_bytes(heads, 1, 128) / DEVICE.copy


def test_steps_add_up():
    """All launches of all layers, attention, the head and what a step launches besides; a token more than its cache."""
    launch_seconds = sum(product_seconds(one, 256, DEVICE) for one in launches("llama-2-7b", 0.0, "identity"))
    attention = attention_seconds(LLAMA, 256, 64, 128, DEVICE)
    whole = step_seconds("llama-2-7b", 0.0, 256, 64, 128, DEVICE)
    head = 2 * 256 * 32000 * 4096 / DEVICE.bfloat16
    assert 32 * (launch_seconds + attention) + head < whole
    assert whole < 32 * (launch_seconds + attention) + 3 * head + 1e-4
    sliced = step_seconds("llama-2-7b", 0.25, 256, 64, 128, DEVICE)
    assert 0.7 < sliced / whole < 1


@pytest.mark.parametrize("name", PAPER)
def test_a_layer_takes_its_operations(name):
    device = PAPER[name]
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    least = 2 * 2048 * weights / device.bfloat16 + 2 * 2048**2 * 4096 / device.bfloat16
    dense, sliced = (layer_seconds("llama-2-7b", size, 1, 2048, device) for size in (0.0, 0.25))
    assert least < dense < 3 * least
    assert sliced < dense
    assert network_times.layer_seconds("llama-2-7b", 0.0, 2, 2048, device) > 1.5 * dense


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
