"""The Triton kernel of `norm_linear`: in the interpreter, and on a GPU where there is one, against float64."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from support.gemm_bounds import assert_within, norm_linear_bound, normal

from slicegpt.kernels import norm_linear as kernel
from slicegpt.kernels.gemm_config import GemmConfig, candidates
from slicegpt.kernels.gemm_tiles import device_class, takes_tma
from slicegpt.ops.contracts import ACTIVATIONS, GATED, NormLinearInputs, block_sums_of_squares

SMALL = GemmConfig(32, 64, 32, num_warps=4, num_stages=3, group_m=2, tma=True)
EPILOGUES = (*ACTIVATIONS, *GATED)


@pytest.fixture(scope="module")
def run(interpreter):
    """Runs in the interpreter: float32 and float16 (it reads bfloat16 wrongly)."""

    def call(*arguments, **options):
        options = {"config": SMALL} | options
        return interpreter(
            "slicegpt.kernels.norm_linear", "norm_linear", NormLinearInputs(*arguments), **options
        )

    return call


def check(run, h, n_scaled, z, activation, bias=True, sums=True, **options):
    weight = normal(n_scaled + z, h.shape[1], dtype=h.dtype, seed=1, device=h.device) / h.shape[1] ** 0.5
    bias = normal(n_scaled, dtype=h.dtype, seed=2, device=h.device) if bias else None
    sumsq = block_sums_of_squares(h.float()) if sums else None
    settings = (n_scaled, activation, 1.25 * max(h.shape[1], 1), 1e-5)
    expected, bound = norm_linear_bound(h, weight, bias, *settings)
    actual = run(h, weight, bias, sumsq, *settings, **options)
    assert actual.dtype == h.dtype
    assert_within(actual, expected, bound)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("activation", EPILOGUES)
def test_epilogues(run, activation, tma, dtype):
    """Every activation with z columns, and with neither z columns, bias nor sums of squares."""
    h = normal(37, 64, dtype=dtype, seed=0)
    config = replace(SMALL, tma=tma)
    check(run, h, 72, 24, activation, config=config)
    check(run, h, 72, 0, activation, bias=False, sums=False, config=config)


# d, n_scaled and z: every width even, or every one odd (of a gated launch the halves, as gate and up are equal).
EVEN, ODD_WIDTHS = (32, 44, 10), (33, 41, 9)


@pytest.mark.parametrize("widths", [EVEN, ODD_WIDTHS], ids=["even", "odd"])
@pytest.mark.parametrize("has_z", [True, False])
@pytest.mark.parametrize("activation", EPILOGUES)
def test_every_combination(run, activation, has_z, widths):
    """Every activation with and without z columns, biases and given sums of squares, at even and at odd widths."""
    inner, n_scaled, z = widths
    if activation in GATED:
        n_scaled += n_scaled % 2
    h = normal(5, inner, dtype=torch.float32, seed=0)
    for bias, sums in itertools.product((True, False), repeat=2):
        check(run, h, n_scaled, z * has_z, activation, bias=bias, sums=sums)


# T, d, n_scaled, z: nothing a multiple of anything, single rows and columns, and no scaled or no z columns.
ODD = [
    (33, 45, 38, 7),
    (1, 1, 2, 1),
    (5, 1, 0, 3),
    (1, 70, 66, 65),
    (65, 33, 130, 0),
    (40, 32, 0, 80),
    (3, 0, 4, 2),
]


@pytest.mark.parametrize(("rows", "inner", "n_scaled", "z"), ODD)
@pytest.mark.parametrize("activation", ["gelu", "silu_gated"])
def test_odd_shapes(run, rows, inner, n_scaled, z, activation):
    check(run, normal(rows, inner, dtype=torch.float32, seed=0), n_scaled, z, activation)


def test_many_rows_are_scaled_by_a_kernel_of_their_own(run):
    h = normal(kernel.SUM_IN_TILE_ROWS + 3, 40, dtype=torch.float16, seed=0)
    check(run, h, 40, 8, "silu", config=replace(SMALL, block_m=128))


@pytest.mark.parametrize("columns", [64, 65])
def test_strided_rows(run, columns):
    """A slice of a wider stream; TMA reads it where its rows are aligned."""
    wide = normal(37, 80, dtype=torch.float16, seed=0)
    check(run, wide[:, :columns], 48, 16, "gelu_tanh")
    check(run, wide[::2, 80 - columns :], 48, 16, "none", sums=False)


@pytest.mark.parametrize("activation", ["silu_gated", "none"])
def test_into_columns_of_a_wider_matrix(run, activation):
    """The result, of rows farther apart than they are long, and nothing beside it."""
    h = normal(37, 64, dtype=torch.float16, seed=0)
    columns = 60 if activation == "silu_gated" else 96
    wide = torch.full((37, columns + 24), 7, dtype=torch.float16)
    actual = check(run, h, 72, 24, activation, out=wide[:, 8:-16])
    wide = actual.as_strided(wide.shape, wide.stride(), 0)  # the interpreter's process has a copy
    assert (wide[:, :8] == 7).all()
    assert (wide[:, -16:] == 7).all()


def test_zero_rows_and_columns(run):
    for rows, n_scaled, z in ((0, 8, 4), (5, 0, 0)):
        h = normal(rows, 16, dtype=torch.float16, seed=0)
        weight = normal(n_scaled + z, 16, dtype=torch.float16, seed=1)
        actual = run(h, weight, None, None, n_scaled, "silu_gated", 16.0, 1e-5)
        assert actual.shape == (rows, n_scaled // 2 + z)


@pytest.mark.parametrize("activation", ["none", "silu_gated"])
def test_float16_streams_of_60000(run, activation):
    """Products of 60000 and their sums overflow float16 by far; what is scaled does not."""
    h = 60000 * normal(33, 64, dtype=torch.float32, seed=0).sign()
    h[:, ::2] /= 1e4
    actual = check(run, h.half(), 64, 0, activation)
    assert actual.abs().max() > 1


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_default_configuration(run, activation):
    check(run, normal(20, 48, dtype=torch.float16, seed=0), 64, 16, activation, config=None)


def test_takes_tma():
    half = torch.zeros(8, 64, dtype=torch.float16)
    assert takes_tma(half, None)
    assert takes_tma(half[:, :40])
    assert takes_tma(half[:, 8:])
    assert not takes_tma(half[:, 1:])  # the first element is not at a multiple of 16 bytes
    assert not takes_tma(torch.zeros(8, 60, dtype=torch.float16))  # nor are the rows
    assert not takes_tma(half[:0])
    assert not takes_tma(half[:1].expand(8, 64))


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


def on_gpu(*arguments, config=None):
    return kernel.norm_linear(NormLinearInputs(*arguments), config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", EPILOGUES)
@pytest.mark.parametrize("rows", [1, 37, 700])
def test_gpu(rows, activation, dtype):
    skip_unless_supported(dtype)
    h = normal(rows, 576, dtype=dtype, seed=0, device="cuda")
    check(on_gpu, h, 1536, 192, activation)
    check(on_gpu, h[:, :570], 1536, 0, activation, bias=False, sums=False)
    check(on_gpu, normal(rows, 333, dtype=dtype, seed=0, device="cuda"), 130, 77, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(gpu_config_count()))
def test_gpu_every_candidate(index):
    dtype = torch.bfloat16
    skip_unless_supported(dtype)
    options = candidates(device_class(torch.device("cuda", 0)), dtype)
    h = normal(300, 512, dtype=dtype, seed=0, device="cuda")
    for activation in ("gelu", "silu_gated"):
        for tma in (options[index].tma,) if index else (options[index].tma, False):
            config = replace(options[index], tma=tma)
            first = check(on_gpu, h, 1000, 200, activation, config=config)
            assert torch.equal(first, check(on_gpu, h, 1000, 200, activation, config=config))
