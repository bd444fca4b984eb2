"""No kernel reads or writes outside of its tensors, at shapes that fit nothing: a memory checker without a GPU.

The emulated kernels run on tensors beside forbidden pages (tests/support/guarded_memory.py), inputs, outputs and
workspaces alike; their dynamic shared memory lies beside such pages as well (emulation/guarded_shared.h).
"""

import ctypes

import pytest
import torch
from support.guarded_memory import GuardedAllocator, allocate_all_with, fault_of

from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.cuda import epilogue as cuda_epilogue
from slicegpt.ops.cuda import gram as cuda_gram
from slicegpt.ops.cuda import rotate_wgmma
from slicegpt.ops.cuda.decode import DecodeConfig, DecodeDevice

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PLACES = {"before": dict(at_end=True), "behind": dict(at_end=False), "unaligned": dict(at_end=True, align=2)}


def random(allocator, *shape, dtype=F16):
    generator = torch.Generator().manual_seed(0)
    return allocator.copy(torch.randn(*shape, generator=generator, dtype=F64).to(dtype))


def gram_cases(allocator, capability):
    """Every kernel of gram_: rows and columns beside every tile, weights, tokens that are handed over."""
    for precision, dtype in (
        ("fp64", F16),
        ("fp64", F32),
        ("fp64", F64),
        ("exact", F16),
        ("exact", F32),
        ("fast", F16),
    ):
        for tokens, columns in ((1, 1), (37, 63), (65, 130)):
            X = random(allocator, tokens, columns, dtype=dtype)
            C = random(allocator, columns, columns, dtype=F64).zero_()
            weight = allocator.copy(torch.linspace(0, 1, tokens, dtype=F64).round(decimals=1))
            for w in (None, weight):
                getattr(cuda_gram, f"gram_{precision}")(C, X, w)


def wgmma_cases(allocator, capability):
    X = random(allocator, 65, 130)
    C = random(allocator, 130, 130, dtype=F64).zero_()
    for kernel in (2, 3) if capability >= (9, 0) else ():
        cuda_gram._requested_exact_kernel = lambda X, kernel=kernel: kernel
        cuda_gram.gram_exact(C, X, None)


def decode_cases(allocator, capability):
    """Rows of weights and columns beside every tile and chunk, splits of K, factors, the epilogues alone."""
    configs = [DecodeConfig(2, 2, 1), DecodeConfig(2, 1, 3)]
    for dtype in (F16, F32):
        for tokens, d, N in ((1, 33, 35), (3, 104, 70), (13, 77, 19)):
            h, weight = random(allocator, tokens, d, dtype=dtype), random(allocator, N, d, dtype=dtype)
            scaled = N // 3 * 2
            bias = random(allocator, scaled, dtype=dtype)
            rank = 8
            a, out = (
                random(allocator, tokens, d + rank, dtype=dtype),
                random(allocator, N, d + rank, dtype=dtype),
            )
            stream, factor = (
                random(allocator, tokens, N, dtype=dtype),
                random(allocator, rank, N, dtype=dtype),
            )
            shortcut = random(allocator, N, N, dtype=dtype)
            for config in configs:
                cuda_decode.norm_linear_config = cuda_decode.rotate_add_config = lambda *_, c=config: c
                for module in (cuda_decode, cuda_epilogue):
                    for act in ("none", "silu_gated"):
                        module.norm_linear(
                            NormLinearInputs(h, weight, bias, None, scaled, act, float(d), 1e-5)
                        )
                    module.rotate_add(a, out, stream, shortcut, None)
                    module.rotate_add(a, out, stream, None, None)
                cuda_decode.rotate_add(a, out, stream, None, None, factor)


def rotate_wgmma_cases(allocator, capability):
    """Tiles that end beside rows, columns and steps; what TMA cannot read is not read by the kernel."""
    for dense in (True, False):
        rows, columns, inner, width = 130, 264, 72, 40
        a, weight, h = (
            random(allocator, *shape) for shape in ((rows, inner), (columns, inner), (rows, width))
        )
        shortcut = random(allocator, columns, width) if dense else None
        bias = random(allocator, columns)
        for kernel in rotate_wgmma.KERNELS:
            if rotate_wgmma.takes(a, weight, h, shortcut, bias):
                rotate_wgmma.rotate_add(a, weight, h, shortcut, bias, kernel)


KERNELS = {
    "gram": gram_cases,
    "wgmma": wgmma_cases,
    "decode": decode_cases,
    "rotate_wgmma": rotate_wgmma_cases,
}


def in_bounds(cases, place, capability):
    inputs = GuardedAllocator(**PLACES[place])
    # Outputs and workspaces are aligned as torch's own are.
    allocated = GuardedAllocator(at_end=PLACES[place]["at_end"], align=64)
    cuda_decode.decode_device = lambda device: DecodeDevice(3, 1 << 20, overlap=True)
    allocate_all_with(allocated)
    cases(inputs, capability)
    inputs.check()
    allocated.check()


# sm_75: other tensor-core shapes, and copies that are plain loads and stores.
CASES = [("sm_75", "gram"), ("sm_75", "decode"), *(("sm_90", kernel) for kernel in KERNELS)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("target", "kernel"), CASES, indirect=["target"], scope="session")
def test_no_access_outside(backend, target, kernel, place):
    fault = fault_of(lambda: in_bounds(KERNELS[kernel], place, target[0]))
    assert fault is None, f"{kernel}, {place}: {fault}"


@pytest.mark.parametrize(
    ("target", "mistake"),
    [("sm_75", "shape"), *(("sm_90", mistake) for mistake in ("read", "write", "beside", "shape"))],
    indirect=["target"],
    scope="session",
)
def test_planted_mistakes_are_found(backend, target, mistake):
    """One item too far, read or written; a write into the few bytes before the page; a kernel told a wrong size."""

    def run():
        allocator = GuardedAllocator(at_end=True)
        X = random(allocator, 37, 63)
        end = X.data_ptr() + X.nbytes
        if mistake == "read":
            ctypes.string_at(end, 16)
        elif mistake == "write":
            ctypes.memset(end + 15, 0, 1)
        elif mistake == "beside":
            assert X.nbytes % 16
            ctypes.memset(end, 0, 1)
        else:
            C = torch.zeros(63, 63, dtype=F64)
            longer = (ctypes.c_char * (38 * 63 * 2)).from_address(X.data_ptr())
            cuda_gram.gram_fp64(C, torch.frombuffer(longer, dtype=F16).view(38, 63), None)
        allocator.check()

    fault = fault_of(run)
    assert fault is not None
    assert fault.startswith("SIGSEGV" if mistake != "beside" else "AssertionError: bytes beside")
