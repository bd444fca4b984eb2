"""norm_linear's and rotate_add's CUDA kernels for 1 to 16 rows, and the epilogues alone, against float64.

Bounds, with u = 2^-24. A sum of K products in float32, in any order: K u A, A the same sum of magnitudes; twice that,
because tensor cores truncate. The row's scale and the bias add 8 roundings of their own, its sum of squares (K + 40)
halves. An activation changes by at most 1.13 times its argument's change (a square by twice its argument times it), and
has an error of its own of 2^-20. A result is rounded once to its format, to U of its magnitude, or by half of float16's
smallest number.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slicegpt.errors import SliceGPTError
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.cuda import epilogue as cuda_epilogue
from slicegpt.ops.cuda.decode import DecodeConfig, DecodeDevice

# What stands for a device in the emulation.
SMALL = DecodeDevice(multiprocessors=3, l2_bytes=1 << 20, overlap=False)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [F16, BF16, F32]
NAMES = ["float16", "bfloat16", "float32"]
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu2": lambda x: x.clamp_min(0).square(),
}
GATED = ["silu_gated", "gelu_gated", "gelu_tanh_gated"]
ROUNDING = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}
U = 2.0**-24
DIVISOR, EPS = 96.0, 1e-5


@pytest.fixture
def run(backend, target, monkeypatch):
    """A function that calls a launcher on the backend's device with copies that keep their strides."""
    if backend.device == "cpu":
        monkeypatch.setattr(cuda_decode, "decode_device", lambda device: SMALL)

    def call(launcher, *arguments):
        moved = [backend._move(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        result = (
            launcher(NormLinearInputs(*moved)) if launcher.__name__ == "norm_linear" else launcher(*moved)
        )
        return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

    call.capability = target[0]
    return call


@pytest.fixture
def config(monkeypatch):
    """A function that makes both launchers take a given configuration."""

    def force(row_warps, column_warps, split_k):
        chosen = DecodeConfig(row_warps, column_warps, split_k)
        monkeypatch.setattr(cuda_decode, "norm_linear_config", lambda *_: chosen)
        monkeypatch.setattr(cuda_decode, "rotate_add_config", lambda *_: chosen)

    return force


def skip_unless_supported(run, dtype, tokens=1, module=cuda_decode):
    if not module.is_supported(run.capability, dtype, tokens):
        pytest.skip("not on this device")


def random(*shape, dtype=F16, seed=0, scale=1.0, pitch=None):
    """Gaussian numbers; with `pitch`, rows so many items apart and NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if pitch is None:
        return values
    wide = torch.full((shape[0], pitch), torch.nan, dtype=dtype)
    wide[:, : shape[1]] = values
    return wide[:, : shape[1]]


def norm_linear_arguments(
    tokens, d, N, n_scaled, activation="none", dtype=F16, bias=True, sumsq=True, pitch=None
):
    h = random(tokens, d, dtype=dtype, pitch=pitch)
    weight = random(N, d, dtype=dtype, seed=1, scale=d**-0.5, pitch=pitch)
    shift = random(n_scaled, dtype=dtype, seed=2) if bias else None
    parts = None
    if sumsq:
        parts = torch.nn.functional.pad(h.float().square(), (0, -d % 32)).unflatten(1, (-1, 32)).sum(2)
    return h, weight, shift, parts, n_scaled, activation, DIVISOR, EPS


def check_norm_linear(y, h, weight, bias, sumsq, n_scaled, activation, divisor, eps):
    d, dtype = h.shape[1], h.dtype
    h64, w64 = h.double(), weight.double()
    scale = (h64.square().sum(1, keepdim=True) / divisor + eps).rsqrt()
    product, magnitude = h64 @ w64.T, h64.abs() @ w64.abs().T
    shift = 0 if bias is None else bias.double()
    pre = product[:, :n_scaled] * scale + shift
    slack = 2 * (1.5 * d + 48) * U * (magnitude[:, :n_scaled] * scale + abs(shift))
    act = ACTIVATIONS[activation.removesuffix("_gated")]
    own = 2.0**-20
    if activation.endswith("_gated"):
        (gate, up), (gate_slack, up_slack) = pre.chunk(2, 1), slack.chunk(2, 1)
        value = act(gate) * up
        gate_slack = 1.13 * gate_slack + own * (1 + gate.abs())
        bound = gate_slack * (up.abs() + up_slack) + act(gate).abs() * up_slack
    else:
        value = act(pre)
        slope = 2 * (pre.abs() + slack) if activation == "relu2" else 1.13
        bound = slack if activation == "none" else slope * slack + own * (1 + pre.abs() + value.abs())
    expected = torch.cat((value, product[:, n_scaled:]), 1)
    bound = torch.cat((bound, 2 * d * U * magnitude[:, n_scaled:]), 1)
    check(y, expected, bound, dtype)


def check(actual, expected, bound, dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    bound = bound + ROUNDING[dtype] * (expected.abs() + bound) + (2.0**-25 if dtype is F16 else 0)
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"error {(error / bound).max():.2f} times the bound"


def rotate_add_arguments(tokens, K, d, N, dense, dtype=F16, bias=True, pitch=None):
    a = random(tokens, K, dtype=dtype, seed=3, pitch=pitch)
    weight = random(N, K, dtype=dtype, seed=4, scale=K**-0.5, pitch=pitch)
    h = random(tokens, d, dtype=dtype, seed=5, pitch=pitch)
    shortcut = random(N, d, dtype=dtype, seed=6, scale=d**-0.5, pitch=pitch) if dense else None
    return a, weight, h, shortcut, random(N, dtype=dtype, seed=7) if bias else None


def compact_arguments(tokens, inner, rank, d, N, dtype=F16, pitch=None):
    """rotate_add's arguments for `[a | z]` and `[W | -F padded]`; and Fᵀ as norm_linear's last rows hold it."""
    a, weight, h, _, bias = rotate_add_arguments(tokens, inner + rank, d, N, False, dtype)
    rows = random(rank + 5, d, dtype=dtype, seed=9, scale=max(rank, 1) ** -0.5, pitch=pitch)
    weight[:, inner:] = 0
    weight[:d, inner:] = -rows[5:].T
    return (a, weight, h, None, bias), rows[5:]


def spoilt(matrix, begin):
    """A copy with the same strides, NaN from column `begin` on."""
    copy = torch.empty_strided(matrix.shape, matrix.stride(), dtype=matrix.dtype)
    copy.copy_(matrix)[:, begin:] = torch.nan
    return copy


def check_rotate_add(result, a, weight, h, shortcut, bias):
    h_next, sumsq = result
    N = weight.shape[0]
    expected = a.double() @ weight.double().T
    magnitude = a.double().abs() @ weight.double().abs().T
    terms = a.shape[1] + 4
    if shortcut is None:
        expected[:, : h.shape[1]] += h.double()
        magnitude[:, : h.shape[1]] += h.double().abs()
    else:
        expected += h.double() @ shortcut.double().T
        magnitude += h.double().abs() @ shortcut.double().abs().T
        terms += h.shape[1]
    if bias is not None:
        expected += bias.double()
        magnitude += bias.double().abs()
    check(h_next, expected, 2 * terms * U * magnitude, a.dtype)
    # Of what is stored: 32 squares and sums of positive numbers.
    squares = torch.nn.functional.pad(h_next.double().square(), (0, -N % 32)).unflatten(1, (-1, 32)).sum(2)
    assert sumsq.dtype is F32
    assert sumsq.shape == squares.shape
    assert ((sumsq.double() - squares).abs() <= 40 * U * squares).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED])
@pytest.mark.parametrize("module", [cuda_decode, cuda_epilogue], ids=["decode", "epilogue"])
def test_norm_linear(run, module, activation, dtype):
    """Every activation, with bias, z columns that are left as they are, and sums of squares from outside."""
    skip_unless_supported(run, dtype, 3, module)
    arguments = norm_linear_arguments(3, 96, 75, 46, activation, dtype)
    check_norm_linear(run(module.norm_linear, *arguments), *arguments)


def test_epilogue_writes_into_columns_of_a_wider_matrix(run):
    """And leaves the others alone."""
    arguments = norm_linear_arguments(3, 96, 75, 46, "silu_gated", F16)
    wide = []

    def into(*arguments):
        inputs = NormLinearInputs(*arguments)
        wide.append(inputs.h.new_full((3, inputs.columns + 9), 7))
        return cuda_epilogue.norm_linear(inputs, out=wide[0][:, 4:-5])

    check_norm_linear(run(into, *arguments), *arguments)
    assert (wide[0][:, :4] == 7).all()
    assert (wide[0][:, -5:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("tokens", range(1, 17))
def test_tokens(run, tokens, dtype):
    """Each number of rows, sums of squares from h, no bias, more chunks than are in flight at a time."""
    skip_unless_supported(run, dtype, tokens)
    arguments = norm_linear_arguments(tokens, 328, 33, 30, "silu_gated", dtype, bias=False, sumsq=False)
    check_norm_linear(run(cuda_decode.norm_linear, *arguments), *arguments)
    arguments = rotate_add_arguments(tokens, 328, 40, 40, False, dtype)
    check_rotate_add(run(cuda_decode.rotate_add, *arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("d", "N"), [(64, 64), (40, 33), (40, 104)])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "residual"])
@pytest.mark.parametrize("module", [cuda_decode, cuda_epilogue], ids=["decode", "epilogue"])
def test_rotate_add(run, module, dense, d, N, dtype):
    """Same width, a narrower one (dense alone), a wider one, where h is padded."""
    skip_unless_supported(run, dtype, 5, module)
    if not dense and d > N:
        pytest.skip("needs a shortcut")
    arguments = rotate_add_arguments(5, 200, d, N, dense, dtype)
    check_rotate_add(run(module.rotate_add, *arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("tokens", [1, 9, 16])
@pytest.mark.parametrize(
    ("inner", "rank", "d", "N", "pitch"),
    [
        (160, 24, 72, 72, 72),
        (160, 19, 101, 101, 103),  # no row of the weights is aligned, nor one of the factor
        (160, 130, 64, 64, 68),
        (96, 16, 40, 72, 40),  # to a wider boundary, in tiles of 64 columns: one has no factor
        (64, 12, 37, 39, 40),
        (0, 24, 72, 72, 72),
    ],
)
def test_factor(run, config, inner, rank, d, N, pitch, tokens, dtype):
    """The compact factor from norm_linear's weight and not from rotate_add's, in one split and in two."""
    skip_unless_supported(run, dtype, tokens)
    arguments, factor = compact_arguments(tokens, inner, rank, d, N, dtype, pitch=pitch)
    without = [*arguments[:1], spoilt(arguments[1], inner), *arguments[2:]]
    for split_k in (1, 2):
        config(4, 2, split_k)
        check_rotate_add(run(cuda_decode.rotate_add, *without, factor), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(
    ("inner", "rank", "change"),
    [
        (165, 19, None),  # rows of 184 items are aligned, 165 of them are no whole pieces
        (161, 24, None),
        (160, 24, "columns apart"),
        (160, 24, "little L2"),
        (160, 0, None),
    ],
)
def test_factor_is_left_alone(run, inner, rank, change, dtype, monkeypatch):
    """Where reading it would not pay, the result is the one without the hint, bit for bit."""
    skip_unless_supported(run, dtype)
    arguments, factor = compact_arguments(3, inner, rank, 72, 80, dtype)
    if change == "columns apart":
        factor = factor.repeat_interleave(2, dim=1)[:, ::2]
    if change == "little L2":
        little = replace(SMALL, l2_bytes=2 * factor.nbytes - 1)
        monkeypatch.setattr(cuda_decode, "decode_device", lambda device: little)
    actual = run(cuda_decode.rotate_add, *arguments, spoilt(factor, 0))
    check_rotate_add(actual, *arguments)
    assert all(map(torch.equal, actual, run(cuda_decode.rotate_add, *arguments)))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("d", "pitch"), [(96, 104), (77, 77), (90, 101), (5, 8), (1, 1)])
def test_strides(run, dtype, d, pitch):
    """Rows apart, rows that are not 16-byte aligned, widths that are no multiple of anything."""
    skip_unless_supported(run, dtype)
    arguments = norm_linear_arguments(2, d, 21, 18, "gelu_gated", dtype, sumsq=False, pitch=pitch)
    check_norm_linear(run(cuda_decode.norm_linear, *arguments), *arguments)
    arguments = rotate_add_arguments(2, d, d, d + 2, True, dtype, pitch=pitch)
    check_rotate_add(run(cuda_decode.rotate_add, *arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("split_k", [2, 3, 5])
def test_splits(run, config, split_k, dtype, monkeypatch):
    """Split columns: the same bits on every call and whichever block arrives last, counters back at zero."""
    skip_unless_supported(run, dtype, 9)
    config(2, 2, split_k)
    arguments = norm_linear_arguments(9, 900, 70, 40, "silu_gated", dtype)
    residual = rotate_add_arguments(9, 520, 480, 70, True, dtype)
    results = []
    for order in "010":
        monkeypatch.setenv("SLICEGPT_EMULATION_REVERSED", order)
        results.append((run(cuda_decode.norm_linear, *arguments), *run(cuda_decode.rotate_add, *residual)))
    check_norm_linear(results[0][0], *arguments)
    check_rotate_add(results[0][1:], *residual)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row_warps=st.sampled_from([1, 2, 3, 4]),
    column_warps=st.integers(1, 4),
    split_k=st.integers(1, 4),
    tokens=st.integers(1, 16),
    d=st.integers(1, 300),
    N=st.integers(1, 80),
    n_scaled=st.integers(0, 80),
    gated=st.booleans(),
)
def test_any_config(run, config, row_warps, column_warps, split_k, tokens, d, N, n_scaled, gated):
    """Whatever the configuration and the shape, also more splits than there are chunks."""
    n_scaled = min(n_scaled, N) // 2 * 2
    config(row_warps, column_warps, split_k)
    arguments = norm_linear_arguments(tokens, d, N, n_scaled, "silu_gated" if gated else "gelu", F16)
    check_norm_linear(run(cuda_decode.norm_linear, *arguments), *arguments)


@pytest.mark.parametrize("module", [cuda_decode, cuda_epilogue], ids=["decode", "epilogue"])
def test_large_values(run, module):
    """A float16 stream of 60000: products and squares are far beyond float16, results are not."""
    arguments = list(norm_linear_arguments(4, 320, 64, 48, "none", bias=True, sumsq=False))
    arguments[0] = torch.where(random(4, 320) > 0, 60000.0, -60000.0).half()
    arguments[1][48:] *= 2.0**-8
    y = run(module.norm_linear, *arguments)
    assert y.isfinite().all()
    check_norm_linear(y, *arguments)
    # The rotation of such a row is as large, its parts are larger; sums of squares are 1e11.
    a, weight, h, shortcut, bias = rotate_add_arguments(4, 96, 64, 64, True)
    h = torch.where(h > 0, 60000.0, -60000.0).half()
    shortcut = torch.eye(64).half()
    shortcut[:, 0] = 0.01
    result = run(module.rotate_add, a, weight, h, shortcut, bias)
    assert result[0].isfinite().all()
    assert result[1].max() > 1e11
    check_rotate_add(result, a, weight, h, shortcut, bias)
    # Beyond the format after all: infinity, as a cast gives it, and no NaN.
    result = run(module.rotate_add, a, weight, h, 2 * torch.eye(64).half(), None)
    assert result[0].isinf().all()


def test_not_a_number(run):
    """A NaN stays in its row, and one beside a row's end or in another token's row is not read into it."""
    arguments = norm_linear_arguments(3, 96, 40, 40, "relu", sumsq=False)
    arguments[0][1, 5] = torch.nan
    y = run(cuda_decode.norm_linear, *arguments)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_no_rows(run):
    arguments = norm_linear_arguments(1, 64, 40, 32, "silu_gated")
    y = run(cuda_decode.norm_linear, arguments[0][:0], *arguments[1:3], arguments[3][:0], *arguments[4:])
    assert y.shape == (0, 24)
    a, weight, h, shortcut, bias = rotate_add_arguments(1, 64, 40, 40, False)
    h_next, sumsq = run(cuda_decode.rotate_add, a[:0], weight, h[:0], shortcut, bias)
    assert h_next.shape == (0, 40)
    assert sumsq.shape == (0, 2)


def test_errors(run):
    arguments = norm_linear_arguments(17, 64, 40, 32)
    with pytest.raises(SliceGPTError, match="norm_linear: the decode kernels take at most 16 rows, got 17"):
        run(cuda_decode.norm_linear, *arguments)
    a, weight, h, shortcut, bias = rotate_add_arguments(1, 64, 40, 40, False)
    with pytest.raises(SliceGPTError, match=r"rotate_add: the decode kernels take .* got torch.float64"):
        run(cuda_decode.rotate_add, a.double(), weight, h, shortcut, bias)


def test_bad_config(run, config):
    arguments = rotate_add_arguments(1, 64, 40, 40, False)
    for bad in [(1, 2, 1), (4, 8, 1), (2, 0, 1)]:
        config(*bad)
        with pytest.raises(SliceGPTError, match="tokens, warps or split_k out of range"):
            run(cuda_decode.rotate_add, *arguments)


def test_is_supported():
    for dtype in (F16, F32):
        assert cuda_decode.is_supported((7, 5), dtype, 16)
        assert cuda_decode.is_supported((9, 0), dtype, 1)
    assert cuda_decode.is_supported((8, 0), BF16, 1)
    assert not cuda_decode.is_supported((7, 5), BF16, 1)
    assert not cuda_decode.is_supported((9, 0), F16, 17)
    assert cuda_epilogue.is_supported((9, 0), F16, 17)
    assert not cuda_decode.is_supported((9, 0), torch.float64, 1)
    assert not cuda_decode.is_supported((7, 0), F16, 1)
    assert not cuda_epilogue.is_supported((7, 5), BF16, 1)


# Llama-2-7B dense and at 25 %: widths of the stream, of the attention and of the MLP, SmolLM2-135M.
@pytest.mark.parametrize("processors", [40, 68, 108, 132])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16])
@pytest.mark.parametrize(
    ("N", "K"), [(4096, 4096), (3072, 11008 + 1024), (23040, 3072), (13312, 3072), (576, 1536)]
)
def test_configs(processors, tokens, N, K):
    """At most 512 threads and 48 KB; enough warps, each with enough chunks, unless the product is tiny."""
    for config in (
        cuda_decode.norm_linear_config(processors, tokens, N, K, 2),
        cuda_decode.rotate_add_config(processors, tokens, N, K, 0, 2),
    ):
        chunks = -(-K * 2 // cuda_decode.CHUNK_BYTES)
        warps = config.row_warps * config.column_warps
        assert warps <= 16
        assert config.column_warps * cuda_decode.CHUNKS_IN_FLIGHT <= chunks
        assert (
            config.split_k == 1
            or chunks // (config.column_warps * config.split_k) >= cuda_decode.MIN_SPLIT_CHUNKS
        )
        in_flight = config.tiles(N) * config.split_k * warps
        if N * K > 1 << 23:
            assert in_flight >= 0.7 * cuda_decode.WARPS_PER_PROCESSOR * processors
        # Activations from L2, as a part of the weights' bytes.
        assert tokens / (16 * config.row_warps) <= 0.25
    assert cuda_decode.rotate_add_config(processors, tokens, N, K, 0, 2).row_warps % 2 == 0
