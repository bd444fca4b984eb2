"""Launches go to the device of the tensors, whichever is the current one.

The emulation has two devices, of three and two multiprocessors; `emulated_launches` counts what was launched on each.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.cuda import epilogue as cuda_epilogue
from slicegpt.ops.cuda import extension, rotate_wgmma
from slicegpt.ops.cuda import gram as cuda_gram

ROOT = Path(__file__).resolve().parents[2]
F16, F64 = torch.float16, torch.float64


def grams(name):
    def run(device="cpu"):
        X = torch.arange(-60.0, 60.0).view(20, 6).to(device, F16)
        C = torch.zeros(6, 6, dtype=F64, device=device)
        getattr(cuda_gram, name)(C, X, None)
        return C, X.double().T @ X.double()

    return run


def norm_linear(module):
    def run(device="cpu"):
        h = torch.ones(2, 32, dtype=F16, device=device)
        y = module.norm_linear(NormLinearInputs(h, h[:1].repeat(24, 1), None, None, 24, "none", 32.0, 0.0))
        return y, torch.full_like(y, 32)

    return run


def rotate_add(module):
    def run(device="cpu"):
        a = torch.ones(2, 32, dtype=F16, device=device)
        h, _ = module.rotate_add(a, a[:1].repeat(32, 1), a, None, None)
        return h, torch.full_like(h, 33)

    return run


LAUNCHERS = {
    **{name: grams(name) for name in ("gram_fp64", "gram_exact", "gram_fast")},
    "decode_norm_linear": norm_linear(cuda_decode),
    "decode_rotate_add": rotate_add(cuda_decode),
    "norm_linear_epilogue": norm_linear(cuda_epilogue),
    "rotate_add_epilogue": rotate_add(cuda_epilogue),
    "rotate_add_wgmma": rotate_add(rotate_wgmma),
}
on_emulation = pytest.mark.parametrize("target", ["sm_90"], indirect=True, scope="session")


@pytest.fixture
def emulated(backend, monkeypatch):
    """A function: how often something was launched on a device; and the current one."""
    module = ctypes.CDLL(extension.module.__file__)
    decode_device = cuda_decode.DecodeDevice(multiprocessors=3, l2_bytes=1 << 20, overlap=False)
    monkeypatch.setattr(cuda_decode, "decode_device", lambda device: decode_device)
    return lambda: (module.emulated_launches(0), module.emulated_launches(1), module.emulated_device())


@on_emulation
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launches_go_to_the_tensors_device(emulated, monkeypatch, name):
    before = emulated()
    monkeypatch.setattr(extension, "device_index", lambda tensor: 1)
    actual, expected = LAUNCHERS[name]()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    after = emulated()
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert after[2] == before[2] == 0  # the current device as before


@on_emulation
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_device_that_is_not_there(emulated, monkeypatch, name):
    before = emulated()
    monkeypatch.setattr(extension, "device_index", lambda tensor: 2)
    with pytest.raises(SliceGPTError, match="the CUDA kernel failed: cudaErrorInvalidDevice"):
        LAUNCHERS[name]()
    assert emulated() == before


def test_every_function_takes_a_device():
    """What csrc/'s headers declare for Python is bound with a device, and the tests above call every launcher."""
    declared = set()
    for header in ("gram.h", "decode.h", "rotate_wgmma.h"):
        text = (ROOT / "csrc" / header).read_text(encoding="utf-8")
        declared |= set(re.findall(r"^(?:int|size_t|bool) (\w+)\(", text, re.MULTILINE))
    declared -= {"gram_fp64_rows"}  # for the other launchers of gram_
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text(encoding="utf-8")
    bound = set(re.findall(r"define_on_device\(\s*m, \"(\w+)\"", bindings))
    assert bound == declared
    others = {
        name for name in bound if name.endswith(("_workspace", "_wgmma")) and name != "rotate_add_wgmma"
    }
    assert bound - others == set(LAUNCHERS)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_on_the_second_gpu(name):
    """While the first one is the current one, on a stream of its own."""
    if not extension.is_available():
        pytest.skip(extension.why_not())
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")), torch.cuda.device(0):
        actual, expected = LAUNCHERS[name]("cuda:1")
        assert torch.cuda.current_device() == 0
    assert torch.equal(actual.cpu(), expected.cpu())
