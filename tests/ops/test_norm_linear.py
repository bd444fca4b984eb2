"""The `norm_linear` operator: arithmetic on the CPU, argument checks, choice of implementation, compilation."""

import logging
import math

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops import norm_linear
from slicegpt.ops.contracts import block_sums_of_squares, sumsq_dtype
from slicegpt.ops.cpu import epilogue as cpu_epilogue
from slicegpt.ops.cpu import extension as cpu_extension
from slicegpt.ops.cpu import gemm as cpu_gemm
from slicegpt.ops.cuda import extension as cuda_extension
from slicegpt.ops.dispatch import GemmDispatcher
from slicegpt.ops.norm_linear import DISPATCHER, is_supported

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PLAIN = ["none", "relu", "gelu", "gelu_tanh", "silu", "relu2"]
GATED = ["silu_gated", "gelu_gated", "gelu_tanh_gated"]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def activated(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activations from their definitions, in float64."""
    if name.endswith("_gated"):
        gate, up = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return activated(gate, name.removesuffix("_gated")) * up
    return {
        "none": lambda: x,
        "relu": lambda: x * (x > 0),
        "gelu": lambda: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "silu": lambda: x / (1 + torch.exp(-x)),
        "relu2": lambda: x * x * (x > 0),
    }[name]()


def expected(h, weight, bias, n_scaled, activation, divisor, eps) -> torch.Tensor:
    """The definition, row by row, in float64: normalise, multiply, shift, activate; the rest unscaled."""
    h, weight = h.double(), weight.double()
    normed = h / torch.sqrt((h * h).sum(dim=1, keepdim=True) / divisor + eps)
    pre = torch.einsum("td,nd->tn", normed, weight[:n_scaled])
    if bias is not None:
        pre = pre + bias.double()
    return torch.cat((activated(pre, activation), torch.einsum("td,nd->tn", h, weight[n_scaled:])), dim=1)


def assert_close(actual, h, weight, bias, n_scaled, activation, divisor, eps) -> None:
    """Products of d terms summed in float32 (float64) err by at most d roundings of the magnitudes' sum, in practice
    by their root; storing rounds by eps of the dtype. The CPU's 16-bit forms round up to three more times (input,
    product, bias), and gating and squaring multiply two such values: 8 roundings of the storage dtype cover them."""
    wanted = expected(h, weight, bias, n_scaled, activation, divisor, eps)
    magnitude = h.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).max()
    scale = torch.rsqrt(h.double().square().sum(dim=1, keepdim=True) / divisor + eps)
    largest_pre = magnitude * scale + (0 if bias is None else bias.double().norm())
    room = largest_pre**2 if activation.endswith("_gated") or activation == "relu2" else largest_pre
    room = torch.maximum(room, magnitude) if n_scaled < len(weight) else room
    accumulated = h.shape[1] * torch.finfo(sumsq_dtype(h.dtype)).eps
    tolerance = 8 * torch.finfo(h.dtype).eps + accumulated
    assert actual.dtype == h.dtype
    assert actual.shape == wanted.shape
    assert ((actual.double() - wanted).abs() <= tolerance * (room + 1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", PLAIN + GATED)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_against_the_definition(monkeypatch, backend, rows, activation, dtype):
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    h, weight = normal(rows, 67, dtype=dtype), normal(53, 67, dtype=dtype, seed=1)
    for n_scaled in (0, 30, 52):
        for bias in (None, normal(n_scaled, dtype=dtype, seed=2)):
            actual = norm_linear(h, weight, bias, None, n_scaled, activation, 90.0, 1e-5)
            assert_close(actual, h, weight, bias, n_scaled, activation, 90.0, 1e-5)
            assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_given_sums_are_used_whatever_their_number(rows, dtype):
    h, weight = normal(rows, 64, dtype=dtype), normal(20, 64, dtype=dtype, seed=1)
    wide = h.to(sumsq_dtype(dtype))
    once = norm_linear(h, weight, None, None, 20, "none", 64.0, 1e-5)
    for parts in (1, 2, 64):
        sums = wide.square().unflatten(1, (parts, -1)).sum(dim=2)
        assert_close(
            norm_linear(h, weight, None, sums, 20, "none", 64.0, 1e-5),
            h,
            weight,
            None,
            20,
            "none",
            64.0,
            1e-5,
        )
    # twice the norm, half the output: the sums are read, not computed again
    halved = norm_linear(h, weight, None, 4 * wide.square(), 20, "none", 64.0, 4e-5)
    assert torch.allclose(halved, once / 2, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_float16_stream_of_60000_does_not_overflow(rows):
    h = torch.full((rows, 512), 60000.0, dtype=torch.float16)
    weight = normal(9, 512, dtype=torch.float16).abs()
    actual = norm_linear(h, weight, None, None, 9, "none", 512.0, 1e-5)
    assert actual.isfinite().all()
    assert_close(actual, h, weight, None, 9, "none", 512.0, 1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_strided_arguments_and_nothing_is_changed(rows, dtype):
    wide = normal(rows, 3 * 33, dtype=dtype)
    rows_of, columns_of = wide[:, 33:66], wide[:, ::3]
    weight = normal(33, 21, dtype=dtype, seed=1).T
    bias, sums = normal(40, dtype=dtype, seed=2)[::2], None
    for h in (rows_of, columns_of):
        before = [tensor.clone() for tensor in (wide, weight, bias)]
        actual = norm_linear(h, weight, bias, sums, 20, "silu_gated", 33.0, 1e-6)
        assert_close(actual, h, weight, bias, 20, "silu_gated", 33.0, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(before, (wide, weight, bias), strict=True))
        assert torch.equal(actual, norm_linear(h, weight, bias, sums, 20, "silu_gated", 33.0, 1e-6))


def test_empty():
    weight = torch.zeros(6, 4)
    assert norm_linear(torch.zeros(0, 4), weight, None, None, 4, "none", 4.0, 0.0).shape == (0, 6)
    assert norm_linear(torch.zeros(0, 4), weight, None, None, 4, "silu_gated", 4.0, 0.0).shape == (0, 4)
    assert norm_linear(torch.zeros(3, 4), weight[:0], None, None, 0, "none", 4.0, 0.0).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_of_zeros(rows, dtype):
    h, weight = torch.zeros(rows, 8, dtype=dtype), normal(6, 8, dtype=dtype)
    assert norm_linear(h, weight, None, None, 4, "none", 8.0, 1e-5).eq(0).all()
    without_eps = norm_linear(h, weight, None, None, 4, "none", 8.0, 0.0)
    assert without_eps[:, :4].isnan().all()  # 0 / 0, as the norm itself
    assert without_eps[:, 4:].eq(0).all()


# --- errors -------------------------------------------------------------------------------------------------

H, W = torch.ones(3, 4), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": H[0]}, r"norm_linear: h must be \[T, d\], got \[4\]"),
        ({"h": H.long()}, "norm_linear: h must be float16, .*, got torch.int64"),
        ({"weight": W[:, :3]}, r"norm_linear: weight must be \[N, d\] for h's 4 columns, got \[6, 3\]"),
        ({"weight": W.half()}, "norm_linear: weight must have h's dtype torch.float32, got torch.float16"),
        ({"weight": W.to("meta")}, "norm_linear: weight must be on h's device cpu, got meta"),
        ({"n_scaled": 7}, "norm_linear: n_scaled must be 0 to weight's 6 rows, got 7"),
        ({"activation": "swish"}, "norm_linear: activation must be one of none, relu, .*, got 'swish'"),
        ({"activation": "silu_gated", "n_scaled": 5, "bias": None}, "n_scaled must be even for 'silu_gated', got 5"),
        ({"bias": W[:, 0]}, r"norm_linear: bias must be \[n_scaled\] = \[4\], got \[6\]"),
        ({"sumsq": H[:2]}, r"norm_linear: sumsq must be \[T, P\] for h's 3 rows, got \[2, 4\]"),
        ({"sumsq": H.double()}, "sumsq must be torch.float32 for a stream of torch.float32, got torch.float64"),
        ({"divisor": 0.0}, "norm_linear: divisor must be above 0, got 0.0"),
        ({"eps": -1.0}, "norm_linear: eps must be at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, message):
    arguments = {
        "h": H,
        "weight": W,
        "bias": torch.ones(4),
        "sumsq": None,
        "n_scaled": 4,
        "activation": "none",
    }
    with pytest.raises(SliceGPTError, match=message):
        norm_linear(**(arguments | {"divisor": 4.0, "eps": 0.0} | changes))


def test_backends_that_cannot_say_so(monkeypatch):
    monkeypatch.setenv("SLICEGPT_BACKEND", "triton")
    with pytest.raises(
        SliceGPTError, match=r"norm_linear: backend 'triton' does not take .*float32, .* rows on a CPU"
    ):
        norm_linear(H, W, None, None, 4, "none", 4.0, 0.0)


# --- choosing an implementation -----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["norm_linear", "rotate_add"])
def test_auto_takes_cuda_for_decode_and_triton_for_prefill(monkeypatch, op):
    pytest.importorskip("triton")
    for present in (True, False):
        monkeypatch.setattr(cuda_extension, "is_available", lambda *_, present=present: present)
        dispatcher = GemmDispatcher(op)

        def found(backend, capability, rows, dtype=torch.float16, dispatcher=dispatcher):
            return dispatcher.find(backend, capability, dtype, rows)

        if present:
            assert [found("auto", (9, 0), rows) for rows in (1, 16, 17)] == ["cuda", "cuda", "triton"]
            assert [found("cuda", (9, 0), rows) for rows in (1, 16, 17)] == ["cuda", "cuda", "epilogue"]
            assert [found("auto", (7, 5), rows) for rows in (16, 4000)] == ["cuda", "epilogue"]
            assert found("auto", (9, 0), 1, torch.float64) == "torch"
            assert found("cuda", (9, 0), 1, torch.float64) is None
        else:
            assert [found("auto", (9, 0), rows) for rows in (1, 17)] == ["triton", "triton"]
            assert found("auto", (7, 5), 4000) == "torch"
            with pytest.raises(
                SliceGPTError,
                match=rf"{op}: backend 'cuda' does not take .*float16, at most 16 rows on compute",
            ):
                dispatcher.choose("cuda", (7, 5), torch.float16, 4)
        assert found("reference", (9, 0), 4) == "reference"


@pytest.mark.parametrize("op", ["norm_linear", "rotate_add"])
def test_a_cpu_takes_its_kernels_for_few_rows(monkeypatch, op):
    most = cpu_gemm.most_rows(torch.float32)
    present = {cpu_gemm: True, cpu_epilogue: True}
    for kernels, limit in ((cpu_gemm, most), (cpu_epilogue, 1 << 20)):
        monkeypatch.setattr(
            kernels,
            "is_supported",
            lambda capability, dtype, rows=1, kernels=kernels, limit=limit: (
                present[kernels] and rows <= limit
            ),
        )
    found = [GemmDispatcher(op).find("auto", None, torch.float32, rows) for rows in (1, most, most + 1)]
    assert found == ["cpu", "cpu", "cpu-epilogue"]
    present[cpu_epilogue] = False
    assert GemmDispatcher(op).find("auto", None, torch.float32, most + 1) == "torch"


def test_is_supported():
    assert is_supported(None, torch.bfloat16)
    assert is_supported(None, torch.float64, rows=4096, backend="reference")
    assert not is_supported(None, torch.float32, backend="triton")
    assert not is_supported(None, torch.int8)
    assert is_supported((7, 5), torch.float16, rows=4096)


def test_the_choice_is_logged_once(caplog):
    DISPATCHER.forget()
    with caplog.at_level(logging.INFO, logger="slicegpt"):
        for _ in range(3):
            norm_linear(H, W, None, None, 4, "none", 4.0, 0.0)
    name = "cpu" if cpu_extension.is_available() else "torch"
    most = cpu_gemm.most_rows(torch.float32)
    assert caplog.messages == [f"norm_linear: torch.float32, at most {most} rows on a CPU: {name}"]


# --- torch.compile, and the GPU -----------------------------------------------------------------------------


# Each family of activations with what it may lack: rows, a bias, given sums, scaled columns, z columns.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "rows", "n_scaled", "bias", "sums"),
    [
        ("none", 1, 8, False, False),
        ("none", 3, 0, False, False),
        ("relu", 3, 10, True, True),
        ("gelu", 0, 8, True, True),
        ("gelu_tanh", 3, 8, True, False),
        ("silu", 1, 8, True, True),
        ("silu_gated", 3, 8, False, True),
        ("silu_gated", 0, 8, False, False),
        ("gelu_gated", 1, 10, True, False),
        ("gelu_tanh_gated", 3, 8, True, True),
    ],
)
def test_opcheck(activation, rows, n_scaled, bias, sums, dtype):
    h, weight = normal(rows, 40, dtype=dtype), normal(10, 40, dtype=dtype)
    shift = torch.ones(n_scaled, dtype=dtype) if bias else None
    given = block_sums_of_squares(h.float()) if sums else None
    arguments = (h, weight, shift, given, n_scaled, activation, 40.0, 1e-5)
    torch.library.opcheck(torch.ops.slicegpt.norm_linear.default, arguments)


def test_compiles_without_graph_breaks():
    weight = normal(10, 40, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(h):
        return norm_linear(h * 2, weight, None, None, 8, "gelu", 40.0, 1e-5) + 1

    for rows in (3, 6):
        h = normal(rows, 40, dtype=torch.float32)
        assert torch.equal(run(h), norm_linear(h * 2, weight, None, None, 8, "gelu", 40.0, 1e-5) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu_gated"])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_on_the_gpu(monkeypatch, backend, dtype, activation, rows):
    if not is_supported(torch.cuda.get_device_capability(), dtype, rows, backend):
        pytest.skip("not supported")
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    h, weight = normal(rows, 577, dtype=dtype), normal(301, 577, dtype=dtype, seed=1)
    bias = normal(200, dtype=dtype, seed=2)
    actual = norm_linear(h.cuda(), weight.cuda(), bias.cuda(), None, 200, activation, 600.0, 1e-5)
    assert_close(actual.cpu(), h, weight, bias, 200, activation, 600.0, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_a_cuda_graph_replays_on_new_data(rows):
    h, weight = normal(rows, 576, dtype=torch.float16).cuda(), normal(300, 576, dtype=torch.float16).cuda()

    def call():
        return norm_linear(h, weight, None, None, 200, "silu_gated", 576.0, 1e-5)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    h.copy_(normal(rows, 576, dtype=torch.float16, seed=5))
    graph.replay()
    assert torch.equal(captured, call())
