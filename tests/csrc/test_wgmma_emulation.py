"""The emulated wgmma itself: it follows the matrix descriptor, and finds the mistakes that a kernel can make with it.

The layouts are written down here once more, from the PTX manual's "Asynchronous Warpgroup Level Matrix Shared Memory
Layout": a right answer means that operand, descriptor and emulation agree, and a wrong layout must give a wrong one.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
# Mode of the descriptor by the bytes of a swizzled row; 16: none.
MODES = {16: 0, 32: 3, 64: 2, 128: 1}
MISTAKES = {
    "no fence": (1, "without wgmma.fence"),
    "touched accumulators": (2, "accumulators were written"),
    "overwritten operand": (4, "shared memory changed under a wgmma"),
    "few threads": (5, "a warpgroup of 128 threads"),
}
READ_TOO_EARLY = 3


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the host emulation needs a C++ compiler")
    target = tmp_path_factory.mktemp("probe") / "probe.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-U_FORTIFY_SOURCE",
        "-DSLICEGPT_ARCH=900",
    ]
    subprocess.run(
        [compiler, *flags, f"-I{HERE / 'emulation'}", HERE / "wgmma_probe.cpp", "-o", target], check=True
    )
    return target


def operands():
    generator = np.random.default_rng(0)
    return (generator.integers(-128, 128, (rows, 32), dtype=np.int8) for rows in (64, 256))


def place(matrix, width, at, shared, shift):
    """Stores a K-major matrix of 32-byte rows `shift` bytes into rows of `width` and returns its descriptor."""
    rows = len(matrix)
    stride = 8 * max(width, 32) if width > 16 else 256
    leading = 128
    for row in range(rows):
        for k in range(0, 32, 16):
            if width == 16:  # core matrices of 8 rows x 16 bytes
                address = at + row // 8 * stride + k // 16 * leading + row % 8 * 16
            else:
                chunk = (shift + k) // 16
                turn = row % 8 * width // 128  # rows of the 128 bytes that all banks hold
                address = at + row // 8 * stride + row % 8 * width + (chunk ^ turn) * 16
            shared[address : address + 16] = matrix[row, k : k + 16].view(np.uint8)
    return (at + shift) >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | MODES[width] << 62


def multiply(library, width, shift=0, mistake=0, spoil=lambda descriptor: descriptor):
    a, b = operands()
    shared = np.zeros(64 * 1024, dtype=np.uint8)
    first = spoil(place(a, width, 0, shared, shift))
    second = place(b, width, 16 * 1024, shared, shift)
    result = np.zeros((64, 256), dtype=np.int32)
    pointer = ctypes.c_void_p
    probe = ctypes.CDLL(str(library)).probe
    probe.argtypes = [pointer, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, pointer]
    probe(shared.ctypes.data, len(shared), first, second, mistake, result.ctypes.data)
    return result, a.astype(np.int32) @ b.astype(np.int32).T


@pytest.mark.parametrize(
    ("width", "shift"), [(16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 32), (128, 96)]
)
def test_descriptor_is_followed(library, width, shift):
    result, expected = multiply(library, width, shift)
    assert (result == expected).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d ^ 3 << 62,  # 32-byte instead of 64-byte swizzle
        lambda d: d ^ 2 << 62,  # none
        lambda d: d ^ 1 << 33,  # another stride
        lambda d: d ^ 2,  # the other half of the rows
    ],
    ids=["swizzle", "no swizzle", "stride", "start"],
)
def test_wrong_layout_gives_a_wrong_product(library, spoil):
    right, expected = multiply(library, 64)
    wrong, _ = multiply(library, 64, spoil=spoil)
    assert (right == expected).all()
    assert (wrong != expected).any()


def test_sums_are_not_there_before_the_wait(library):
    result, expected = multiply(library, 64, mistake=READ_TOO_EARLY)
    assert (result != expected).all()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(library, name):
    """The emulation aborts with a message, so another process makes the mistake."""
    mistake, message = MISTAKES[name]
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {Path(__file__).stem} as t; "
    script += f"t.multiply({str(library)!r}, 64, mistake={mistake})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert message in run.stderr


@pytest.mark.parametrize("fence", [True, False])
def test_a_pair_needs_the_fence_of_its_barriers(library, fence):
    """fence.mbarrier_init: the other block's copies and arrivals are at barriers that it sees to be initialised."""
    script = f"import ctypes; ctypes.CDLL({str(library)!r}).pair(bytes(range(32)), {int(fence)})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode == 0) == fence, run.stderr
    assert ("fence.mbarrier_init" in run.stderr) != fence


def test_unaligned_pattern_is_found(library):
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {Path(__file__).stem} as t; "
    script += f"t.multiply({str(library)!r}, 64, spoil=lambda d: d + 4)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "swizzle pattern is not aligned" in run.stderr
