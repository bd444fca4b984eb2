"""The Triton kernel of `rotate_add`: in the interpreter, and on a GPU where there is one, against float64."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from support.gemm_bounds import (
    assert_sums,
    assert_within,
    norm_linear_bound,
    normal,
    rotate_add_bound,
    sum_error,
)

from slicegpt.kernels import rotate_add as kernel
from slicegpt.kernels.gemm_config import GemmConfig, candidates
from slicegpt.kernels.gemm_tiles import device_class
from slicegpt.ops.contracts import NormLinearInputs

SMALL = GemmConfig(32, 64, 32, num_warps=4, num_stages=3, group_m=2, tma=True)


@pytest.fixture(scope="module")
def run(interpreter):
    """Runs in the interpreter: float32 and float16 (it reads bfloat16 wrongly)."""

    def call(*arguments, config=SMALL):
        return interpreter("slicegpt.kernels.rotate_add", "rotate_add", *arguments, config=config)

    return call


def check(run, a, h, columns, dense, bias=True, **options):
    def random(*shape, seed):
        return normal(*shape, dtype=a.dtype, seed=seed, device=a.device)

    weight = random(columns, a.shape[1], seed=1) / max(a.shape[1], 1) ** 0.5
    shortcut = random(columns, h.shape[1], seed=2) / max(h.shape[1], 1) ** 0.5 if dense else None
    bias = random(columns, seed=3) if bias else None
    expected, bound = rotate_add_bound(a, weight, h, shortcut, bias)
    h_next, sumsq = run(a, weight, h, shortcut, bias, **options)
    assert h_next.dtype == a.dtype
    assert_within(h_next, expected, bound)
    assert_sums(sumsq, h_next)
    return h_next


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("block_n", [32, 128])
def test_epilogues(run, dense, tma, dtype, block_n):
    """With a bias to a boundary of another width, and without one to an equal width."""
    a, h = normal(37, 72, dtype=dtype, seed=0), normal(37, 64, dtype=dtype, seed=4)
    config = replace(SMALL, tma=tma, block_n=block_n)
    check(run, a, h, 104, dense, config=config)
    check(run, a, h, 64, dense, bias=False, config=config)


@pytest.mark.parametrize("odd", [0, 1], ids=["even", "odd"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shortcut", ["identity", "compact", "wider compact", "dense", "narrower dense"])
def test_every_combination(interpreter, run, shortcut, bias, odd):
    """Every shortcut with and without biases, at even and at odd widths; its sums of squares feed `norm_linear`.

    A compact one is compared with the shortcut `[I - F Fᵀ, 0]` written out, z coming from `norm_linear`.
    """
    inner, width, rank = 20 + odd, 44 + odd, 6 + odd
    columns = width + {"wider compact": 8 + odd, "narrower dense": -9 - odd}.get(shortcut, 0)

    def random(*shape, seed):
        return normal(*shape, dtype=torch.float32, seed=seed) / shape[-1] ** 0.5

    h, a, weight = random(5, width, seed=0), random(5, inner, seed=1), random(columns, inner, seed=2)
    shift = random(columns, seed=3) if bias else None
    given, written_out, joined = None, torch.eye(columns, width), weight
    if "dense" in shortcut:
        given = written_out = random(columns, width, seed=4)
    if "compact" in shortcut:
        factor = random(rank, width, seed=5)
        padded = torch.nn.functional.pad(factor, (0, columns - width))
        written_out = (written_out.double() - padded.double().mT @ factor.double()).float()
        both = torch.cat((random(inner, width, seed=6), factor))
        inputs = NormLinearInputs(h, both, None, None, inner, "none", width, 1e-5)
        a = interpreter("slicegpt.kernels.norm_linear", "norm_linear", inputs)
        joined = torch.cat((weight, -padded.mT), dim=1)
    h_next, sumsq = run(a, joined, h, given, shift)
    expected, bound = rotate_add_bound(a[:, :inner], weight, h, written_out, shift)
    if "compact" in shortcut:
        # z is rounded as it is stored, and both products of F are sums of float32; S was rounded to float32 as well.
        size = h.abs().double() @ (torch.eye(width) + factor.abs().mT @ factor.abs()).double()
        bound[:, :width] += sum_error(size, 2 * width + rank)
    assert_within(h_next, expected, bound)
    assert_sums(sumsq, h_next)
    reader = random(8, columns, seed=7)
    inputs = NormLinearInputs(h_next, reader, None, sumsq, 8, "none", float(columns), 1e-5)
    actual = interpreter("slicegpt.kernels.norm_linear", "norm_linear", inputs)
    assert_within(actual, *norm_linear_bound(h_next, reader, None, 8, "none", float(columns), 1e-5))


# T, K, d, d': nothing a multiple of anything, single rows and columns, an empty source.
ODD = [(33, 45, 38, 67), (1, 1, 1, 1), (5, 1, 3, 33), (3, 70, 1, 2), (70, 0, 5, 9), (2, 40, 64, 64)]


@pytest.mark.parametrize(("rows", "inner", "width", "columns"), ODD)
@pytest.mark.parametrize("dense", [True, False])
def test_odd_shapes(run, rows, inner, width, columns, dense):
    a, h = normal(rows, inner, dtype=torch.float32, seed=0), normal(rows, width, dtype=torch.float32, seed=4)
    check(run, a, h, columns, dense)


def test_dense_shortcut_to_fewer_columns(run):
    check(
        run, normal(9, 40, dtype=torch.float16, seed=0), normal(9, 96, dtype=torch.float16, seed=4), 48, True
    )


@pytest.mark.parametrize("dense", [True, False])
def test_strided_rows(run, dense):
    wide = normal(37, 160, dtype=torch.float16, seed=0)
    check(run, wide[:, :72], wide[:, 96:160], 64, dense)
    check(run, wide[:, :71], wide[:, 93:157], 64, dense)


def test_zero_rows(run):
    a, h = normal(0, 16, dtype=torch.float16, seed=0), normal(0, 40, dtype=torch.float16, seed=1)
    h_next, sumsq = run(a, normal(40, 16, dtype=torch.float16, seed=2), h, None, None)
    assert h_next.shape == (0, 40)
    assert sumsq.shape == (0, 2)


@pytest.mark.parametrize("dense", [True, False])
def test_float16_streams_of_60000(run, dense):
    """Massive entries that are carried: their squares and partial sums overflow float16, the next stream does not."""
    h = normal(33, 64, dtype=torch.float16, seed=0)
    h[:, 5], h[:, 40] = 60000, -60000
    shortcut = torch.eye(64, dtype=torch.float16)
    shortcut[5, 40] = shortcut[40, 5] = -0.5  # 60000 + 30000 overflows before ...
    a = torch.full((33, 32), 100.0, dtype=torch.float16)
    weight = torch.zeros(64, 32, dtype=torch.float16)
    weight[5], weight[40] = (-10, 10) if dense else (-1, 1)  # ... 32 · 100 · 10 is taken away
    arguments = (a, weight, h, shortcut if dense else None, None)
    expected, bound = rotate_add_bound(*arguments)
    h_next, sumsq = run(*arguments)
    assert_within(h_next, expected, bound)
    assert_sums(sumsq, h_next)
    assert h_next.abs().max() > 50000


def test_sums_of_squares_feed_norm_linear(interpreter, run):
    """The sums that one kernel writes are the ones that the next reads."""
    a, h = normal(20, 40, dtype=torch.float16, seed=0), normal(20, 72, dtype=torch.float16, seed=1)
    h_next, sumsq = run(a, normal(72, 40, dtype=torch.float16, seed=2), h, None, None)
    weight = normal(64, 72, dtype=torch.float16, seed=3)
    both = [
        interpreter(
            "slicegpt.kernels.norm_linear",
            "norm_linear",
            NormLinearInputs(h_next, weight, None, sums, 64, "none", 72.0, 1e-5),
        )
        for sums in (sumsq, None)
    ]
    # The scales differ by their sums' rounding, far below half a unit of float16; a tie may fall either way.
    assert ((both[0] - both[1]).abs() <= 2.0**-10 * both[1].abs()).all()


def test_default_configuration(run):
    a, h = normal(20, 48, dtype=torch.float16, seed=0), normal(20, 64, dtype=torch.float16, seed=1)
    for dense in (True, False):
        check(run, a, h, 64, dense, config=None)


# --- on a GPU -----------------------------------------------------------------------------------------------


def gpu_config_count() -> int:
    return (
        len(candidates(device_class(torch.device("cuda", 0)), torch.bfloat16))
        if torch.cuda.is_available()
        else 1
    )


def skip_unless_supported(dtype):
    if not kernel.is_supported(torch.cuda.get_device_capability(), dtype):
        pytest.skip("not on this device")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rows", [1, 37, 700])
def test_gpu(rows, dense, dtype):
    skip_unless_supported(dtype)

    def random(columns, seed):
        return normal(rows, columns, dtype=dtype, seed=seed, device="cuda")

    check(kernel.rotate_add, random(1536, 0), random(576, 4), 576, dense)
    check(kernel.rotate_add, random(1000, 0), random(448, 4), 576, dense, bias=False)
    check(kernel.rotate_add, random(333, 0), random(130, 4), 177, dense)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(gpu_config_count()))
def test_gpu_every_candidate(index):
    dtype = torch.bfloat16
    skip_unless_supported(dtype)
    options = candidates(device_class(torch.device("cuda", 0)), dtype)
    a = normal(300, 1000, dtype=dtype, seed=0, device="cuda")
    h = normal(300, 512, dtype=dtype, seed=1, device="cuda")
    for dense in (True, False):
        for tma in (options[index].tma,) if index else (options[index].tma, False):
            config = replace(options[index], tma=tma)
            first = check(kernel.rotate_add, a, h, 512, dense, config=config)
            assert torch.equal(first, check(kernel.rotate_add, a, h, 512, dense, config=config))
