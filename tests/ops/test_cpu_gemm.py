"""The CPU's decode kernels, with every instruction set that this processor has, against float64; their threads."""

import os
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from support.gemm_bounds import assert_sums, assert_within, norm_linear_bound, rotate_add_bound
from support.tiny_models import relative_error, tiny_model

from slicegpt.errors import SliceGPTError
from slicegpt.ops import norm_linear, rotate_add
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cpu import extension, gemm
from slicegpt.ops.dispatch import GemmDispatcher
from slicegpt.ops.norm_linear import DISPATCHER
from slicegpt.runtime import Runtime
from slicegpt.runtime.cache import GrowingStep, KVCache
from slicegpt.runtime.cpu_step import CpuStep
from slicegpt.runtime.executor import Executor

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

EPILOGUES = [
    "none",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "relu2",
    "silu_gated",
    "gelu_gated",
    "gelu_tanh_gated",
]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 31, 70])
def test_norm_linear(instruction_set, rows, dtype):
    """Every epilogue; widths below, at and beyond a vector and beyond what is kept in the cache, columns below and
    beyond a block, some, all or none of them scaled."""
    for d, N, n_scaled in ((67, 53, 30), (1, 3, 2), (64, 150, 132), (33, 20, 0), (1100, 29, 20)):
        h, weight = normal(rows, d, dtype=dtype), normal(N, d, dtype=dtype, seed=1)
        bias, sums = normal(n_scaled, dtype=dtype, seed=2), h.float().square()
        for activation in EPILOGUES:
            for extra in ((None, None), (bias, sums)):
                actual = gemm.norm_linear(
                    NormLinearInputs(h, weight, *extra, n_scaled, activation, 90.0, 1e-5)
                )
                bound = norm_linear_bound(h, weight, extra[0], n_scaled, activation, 90.0, 1e-5)
                assert_within(actual, *bound)


@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 31, 70])
def test_rotate_add(instruction_set, rows, dtype):
    """Dense shortcuts, and none to a boundary as wide or wider; with and without bias."""
    for K, N, d in ((50, 67, 67), (1, 90, 67), (64, 45, 67), (33, 150, 128), (1100, 31, 1050)):
        a, weight = normal(rows, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
        h, dense = normal(rows, d, dtype=dtype, seed=2), normal(N, d, dtype=dtype, seed=3)
        for shortcut in (dense, None) if d <= N else (dense,):
            for bias in (None, normal(N, dtype=dtype, seed=4)):
                h_next, sums = gemm.rotate_add(a, weight, h, shortcut, bias)
                assert_within(h_next, *rotate_add_bound(a, weight, h, shortcut, bias))
                assert_sums(sums, h_next)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_float16_stream_of_60000(instruction_set, rows):
    """Products reach 60000 · 512 · 4: they overflow float16, not float32, and are scaled before they are stored."""
    h = torch.full((rows, 512), 60000.0, dtype=torch.float16)
    weight = normal(9, 512, dtype=torch.float16).abs()
    actual = gemm.norm_linear(NormLinearInputs(h, weight, None, None, 9, "none", 512.0, 1e-5))
    assert_within(actual, *norm_linear_bound(h, weight, None, 9, "none", 512.0, 1e-5))
    small = torch.full_like(weight, 2.0**-20)
    h_next, sums = gemm.rotate_add(h, small, h[:, :9], None, None)
    assert_within(h_next, *rotate_add_bound(h, small, h[:, :9], None, None))
    assert_sums(sums, h_next)


@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_every_value_is_read_and_rounded_right(instruction_set, rows, dtype):
    """Ones times each float16 or bfloat16 there is, and back: the sums' magnitudes are exact, so are the results.

    Instructions for bfloat16 take numbers below 2^-126 for 0; tiles are for four rows and more.
    """
    if dtype is torch.float32:
        values = torch.tensor([0.0, 2.0**-126, 1 / 3, 65519.0, 3e38, float("inf"), -1.5])
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    wanted = values
    if dtype is torch.bfloat16 and (
        instruction_set == "avx512_bf16" or (instruction_set == "amx" and rows > 3)
    ):
        wanted = values.where(values.abs().float() >= 2.0**-126, 0)
    h = torch.ones(rows, 1, dtype=dtype)
    actual = gemm.norm_linear(
        NormLinearInputs(h, values[:, None].contiguous(), None, None, 0, "none", 1.0, 0.0)
    )
    assert torch.equal(actual, wanted.expand(rows, -1))
    # An identity passes the stream and adds what rounds it up, down, to even; infinity at the end of the range.
    if dtype is not torch.float32:
        half_ulps = normal(len(values), 1, dtype=dtype, seed=1)
        stream = values[None].repeat(rows, 1)
        h_next, _ = gemm.rotate_add(h, half_ulps, stream, None, None)
        wanted = (values.float() + half_ulps[:, 0].float()).to(dtype)
        assert torch.equal(h_next, wanted.expand(rows, -1))


@pytest.mark.parametrize("rows", [97, 300])
def test_many_rows(instruction_set, rows, threads):
    """Beyond what tiles multiply at a time: 256 tokens, 2048 columns of x, 256 rows of weights; ends of 16 and of 32
    among them, rows a power of two apart, threads that share out tokens as well."""
    threads(2)
    for d, N, n_scaled in ((40, 300, 300), (2048, 70, 40), (4100, 30, 20)):
        h, weight = normal(rows, d, dtype=torch.bfloat16), normal(N, d, dtype=torch.bfloat16, seed=1)
        bias = normal(n_scaled, dtype=torch.bfloat16, seed=2)
        actual = gemm.norm_linear(NormLinearInputs(h, weight, bias, None, n_scaled, "silu_gated", 90.0, 1e-5))
        assert_within(actual, *norm_linear_bound(h, weight, bias, n_scaled, "silu_gated", 90.0, 1e-5))
    for K, N, d in ((40, 300, 280), (33, 290, 2100), (4100, 31, 1050)):
        a, weight = normal(rows, K, dtype=torch.bfloat16), normal(N, K, dtype=torch.bfloat16, seed=1)
        h, dense = normal(rows, d, dtype=torch.bfloat16, seed=2), normal(N, d, dtype=torch.bfloat16, seed=3)
        for shortcut in (dense, None) if d <= N else (dense,):
            h_next, sums = gemm.rotate_add(a, weight, h, shortcut, None)
            assert_within(h_next, *rotate_add_bound(a, weight, h, shortcut, None))
            assert_sums(sums, h_next)


def test_tiles_are_given_back(threads):
    """torch's library has matrix tiles of its own shapes, and finds them as it left them."""
    threads(2)
    h, weight = normal(40, 100, dtype=torch.bfloat16), normal(70, 100, dtype=torch.bfloat16, seed=1)
    before = h @ weight.mT
    first = gemm.norm_linear(NormLinearInputs(h, weight, None, None, 0, "none", 1.0, 0.0))
    for _ in range(3):
        assert torch.equal(h @ weight.mT, before)
        assert torch.equal(
            gemm.norm_linear(NormLinearInputs(h, weight, None, None, 0, "none", 1.0, 0.0)), first
        )


@pytest.mark.parametrize("dtype", gemm.DTYPES)
def test_not_a_number_stays(instruction_set, dtype):
    h = torch.ones(2, 40, dtype=dtype)
    h[1, 7] = torch.nan
    weight = normal(20, 40, dtype=dtype)
    for activation in EPILOGUES:
        y = gemm.norm_linear(NormLinearInputs(h, weight, None, None, 16, activation, 40.0, 1e-5))
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", gemm.DTYPES)
def test_strided_rows_and_empty_ones(dtype):
    """Through the operators: rows of a wider tensor are read in place, and give what copies give."""
    wide, weight = normal(3, 200, dtype=dtype), normal(70, 67, dtype=dtype, seed=1)
    h, a = wide[:, 5:72], wide[:, 100:150]
    first = norm_linear(h, weight, None, None, 60, "silu_gated", 67.0, 1e-5)
    assert torch.equal(first, norm_linear(h.contiguous(), weight, None, None, 60, "silu_gated", 67.0, 1e-5))
    output = normal(67, 50, dtype=dtype, seed=2)
    for one, other in zip(rotate_add(a, output, h), rotate_add(a.clone(), output, h.clone()), strict=True):
        assert torch.equal(one, other)
    assert gemm.norm_linear(NormLinearInputs(h[:0], weight, None, None, 70, "none", 67.0, 1e-5)).shape == (
        0,
        70,
    )
    assert gemm.rotate_add(a[:0], output, h[:0])[1].shape == (0, 3)


@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 11, 200])
def test_the_same_bits_with_any_number_of_threads(threads, rows, dtype):
    h, weight = normal(rows, 300, dtype=dtype), normal(501, 300, dtype=dtype, seed=1)
    a, output = normal(rows, 501, dtype=dtype, seed=2), normal(300, 501, dtype=dtype, seed=3)
    results = []
    for count in (1, 1, 2, 3, 5):
        threads(count)
        y = gemm.norm_linear(NormLinearInputs(h, weight, None, None, 400, "silu_gated", 300.0, 1e-5))
        results.append((y, *gemm.rotate_add(a, output, h)))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_threads_are_those_of_torch():
    """One OpenMP runtime, torch's; its pool grows to what torch.set_num_threads says, and torch uses the same."""
    # What transformers imports may bring a runtime of its own: torch's is the one that is there before.
    code = """
import os, torch
loaded = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "gomp" in line or "omp5" in line}
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cpu import extension, gemm
library = os.path.realpath(extension.module.openmp_library())
assert loaded == {library}, (loaded, library)
torch.set_num_threads(1)  # making the weights must not start the pool
h, weight = torch.ones(1, 4096), torch.ones(2048, 4096)
def run(threads):
    torch.set_num_threads(threads)
    gemm.norm_linear(NormLinearInputs(h, weight, None, None, 2048, "none", 1.0, 0.0))
    return len(os.listdir("/proc/self/task"))
counts = [run(1), run(3), run(2), run(3)]
torch.set_num_threads(3)
torch.ones(1 << 22).exp()
print(*(count - counts[0] for count in counts[:2]), len(os.listdir("/proc/self/task")) - counts[3])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "2", "0"]


# --- a step through all blocks ------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("dtype", gemm.DTYPES)
@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt", "phi", "qwen3-tied"])
@pytest.mark.parametrize("batch", [1, 3, 16, 37])
def test_a_step(instruction_set, batch, case, dtype):
    """Against the network block by block in float64, on the same cache: norms of heads, rotary positions on all or a
    part of them, windows, padding, parallel blocks.

    Each block rounds what it writes a few times to eps / 2 of the dtype, and passes the error on: within 8 roundings a
    block. float16's and bfloat16's own caches are what both read.
    """
    runtime = Runtime(tiny_model(case, dtype))
    packed = runtime.executor.packed
    exact = Executor(_widened(packed))
    for slot, padded in ((0, False), (5, True), (13, True)):
        cache = KVCache.allocate(runtime.config, batch, 16, dtype, packed.device)
        generator = torch.Generator().manual_seed(slot)
        cache.keys.normal_(generator=generator)
        cache.values.normal_(generator=generator)
        cache.valid[: batch // 2 + 1, : slot // 2] = not padded
        wide = replace(cache, keys=cache.keys.double(), values=cache.values.double())
        positions = torch.arange(batch) % (slot + 1)
        ids = torch.arange(batch)[:, None] + 5
        stream = runtime.executor.embed(ids, positions[:, None])
        actual = CpuStep(packed, cache).run(stream, positions, slot, padded)
        step = GrowingStep(wide, 1, exact.angles(positions), slot, padded)
        wanted, _ = exact.blocks(stream.double(), step)
        tolerance = 8 * len(packed.blocks) * torch.finfo(dtype).eps
        assert relative_error(actual, wanted) < tolerance
        # the new token is in the cache, and nothing else has changed
        assert relative_error(cache.keys[:, :, slot], wide.keys[:, :, slot]) < tolerance
        assert relative_error(cache.values[:, :, slot], wide.values[:, :, slot]) < tolerance
        for now, then in ((cache.keys, wide.keys), (cache.values, wide.values)):
            now, then = now.clone(), then.clone()
            now[:, :, slot] = then[:, :, slot] = 0
            assert torch.equal(now.double(), then)


@torch.inference_mode()
@pytest.mark.parametrize("case", ["llama", "phi"])
def test_a_step_gives_the_same_bits_with_any_number_of_threads(threads, case):
    packed = Runtime(tiny_model(case, torch.bfloat16)).executor.packed
    stream, positions = normal(3, packed.embedding.shape[1], dtype=torch.bfloat16), torch.tensor([4, 2, 0])
    results = []
    for count in (1, 2, 3):
        threads(count)
        cache = KVCache.allocate(packed.config, 3, 8, torch.bfloat16, packed.device)
        results.append(CpuStep(packed, cache).run(stream, positions, 4, False).clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _widened(packed):
    """A packed network in float64: the same values."""

    def widen(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        if isinstance(value, tuple):
            return tuple(widen(one) for one in value)
        if is_dataclass(value):
            return replace(
                value, **{field.name: widen(getattr(value, field.name)) for field in fields(value)}
            )
        return value

    return replace(widen(packed), dtype=torch.float64)


def test_where_a_step_is_not_supported():
    runtime = Runtime(tiny_model("llama", torch.float64), decoder="fused")
    with pytest.raises(
        SliceGPTError, match=r"decoder: 'fused' needs the CPU's kernels .* got 1 of torch.float64"
    ):
        runtime.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    automatic = Runtime(tiny_model("llama", torch.float32))
    most = gemm.most_rows(torch.float32)
    assert [automatic.decoder_name(batch) for batch in (1, most, most + 1)] == ["fused", "fused", "growing"]


# --- choosing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign_mkl", [False, True])
@pytest.mark.parametrize("amx", ["nowhere", "in torch", "here"])
def test_the_kernels_are_chosen_for_a_few_rows(monkeypatch, amx, foreign_mkl):
    """Of bfloat16 for any number of rows, where they have matrix tiles."""
    monkeypatch.setattr(gemm, "_has_tiles", lambda: amx == "here")
    monkeypatch.setattr(gemm, "_torch_has_amx", lambda: amx != "nowhere")
    monkeypatch.setattr(gemm, "_has_foreign_mkl", lambda: foreign_mkl)
    monkeypatch.setattr(gemm, "_has_only_avx2", lambda: False)
    for op in ("norm_linear", "rotate_add"):
        find = GemmDispatcher(op).find
        for dtype in gemm.DTYPES:
            most = 256 if foreign_mkl and dtype is torch.float32 else 32
            if amx != "nowhere" and dtype is torch.bfloat16:
                most = 4
                if amx == "here":
                    assert find("auto", None, dtype, 1 << 20) == "cpu"
                    continue
            assert find("auto", None, dtype, most) == "cpu"
            other = "torch" if dtype is torch.float16 else "cpu-epilogue"
            assert find("auto", None, dtype, most + 1) == other
        assert find("auto", None, torch.float64, 1) == "torch"
        monkeypatch.setattr(gemm, "_has_only_avx2", lambda: True)
        assert find("auto", None, torch.bfloat16, 1 << 20) == "cpu"
        assert find("auto", None, torch.float16, 33) == "torch"
        monkeypatch.setattr(gemm, "_has_only_avx2", lambda: False)


def test_without_the_module(monkeypatch):
    h, weight = normal(2, 40, dtype=torch.float32), normal(20, 40, dtype=torch.float32)
    with_kernels = norm_linear(h, weight, None, None, 20, "silu", 40.0, 1e-5)
    monkeypatch.setattr(extension, "module", None)
    DISPATCHER.forget()
    reason = "slicegpt was installed without its CPU part (no C++ compiler was found, or SLICEGPT_CPU=0)"
    assert extension.build_info() == {"cpu part": reason}
    assert torch.allclose(norm_linear(h, weight, None, None, 20, "silu", 40.0, 1e-5), with_kernels, atol=1e-5)
    assert Runtime(tiny_model("llama", torch.float32)).decoder_name(1) == "growing"
    with pytest.raises(
        SliceGPTError, match="decode step: the CPU kernels are not available: slicegpt was inst"
    ):
        gemm.new_step(torch.float32)
    monkeypatch.undo()
    DISPATCHER.forget()


# slicegpt.ops and two operators as they are where the compiled module is missing; the arguments are environment
# variables for the second half.
WITHOUT_MODULE = """
import sys
sys.modules["slicegpt._cpu"] = None
import torch
from slicegpt.ops import gram_, norm_linear
print("imported", file=sys.stderr)
h, weight = torch.ones(2, 8), torch.ones(4, 8)
for _ in range(3):
    norm_linear(h, weight, None, None, 4, "none", 8.0, 1e-5)
    gram_(torch.zeros(8, 8, dtype=torch.float64), h)
norm_linear(h.double(), weight.double(), None, None, 4, "none", 8.0, 1e-5)
"""


@pytest.mark.parametrize("variables", [{}, {"SLICEGPT_CPU_ISA": "none"}, {"SLICEGPT_BACKEND": "reference"}])
def test_one_warning_where_the_kernels_are_missing(variables):
    """At the first call and not at import; none for those who left the kernels out themselves."""
    command = [sys.executable, "-c", WITHOUT_MODULE]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    imported, *warnings = done.stderr.splitlines()
    assert imported == "imported"
    if variables:
        assert not warnings
    else:
        (line,) = warnings
        assert "running without the CPU's kernels" in line
        assert "install g++" in line


def test_instruction_sets_by_name():
    with pytest.raises(
        SliceGPTError, match=r"SLICEGPT_CPU_ISA must be none or one of .*portable.*, got 'mmx'"
    ):
        extension.use_instruction_set("mmx")
    code = "from slicegpt.ops.cpu import extension; print(extension.build_info())"
    for name in ("portable", "none"):
        environment = os.environ | {"SLICEGPT_CPU_ISA": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("portable (of" if name == "portable" else "SLICEGPT_CPU_ISA=none") in done.stdout
