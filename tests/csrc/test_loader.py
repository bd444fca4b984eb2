"""slicegpt.ops.cuda.extension without its module, with a module for other devices, and what it says about itself."""

import types

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops.cuda import extension, gram


def stand_in(*architectures):
    return types.SimpleNamespace(
        architectures=lambda: list(architectures), version=lambda: "1.2.3", nvcc_version=lambda: "13.0.88"
    )


@pytest.fixture
def without_module(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "_import_error", None)


def test_without_the_module(without_module):
    reason = "slicegpt was installed without its CUDA part (nvcc was not found, or SLICEGPT_CUDA=0)"
    assert extension.why_not() == reason
    assert not extension.is_available()
    assert extension.build_info() == {"cuda part": reason}
    with pytest.raises(
        SliceGPTError, match="gram_: the CUDA backend is not available: slicegpt was installed"
    ):
        gram.gram_fp64(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(1, 2), None)


def test_a_module_that_does_not_load(without_module, monkeypatch):
    monkeypatch.setattr(extension, "_import_error", "undefined symbol: x")
    assert extension.why_not() == "slicegpt._C does not load: undefined symbol: x"


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(extension, "module", stand_in("sm_80"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension.why_not() == "torch finds no CUDA device"
    assert extension.build_info() == {
        "cuda part": "slicegpt._C 1.2.3",
        "nvcc": "13.0.88",
        "architectures": "sm_80",
        "usable": "torch finds no CUDA device",
    }


def test_built_for_another_device(monkeypatch):
    monkeypatch.setattr(extension, "module", stand_in("sm_80", "sm_90a"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert extension.why_not() == "slicegpt._C was built for sm_80, sm_90a, but the device is sm_120"
    # A machine's other devices, whichever is the current one.
    assert extension.is_available((9, 0))
    assert extension.is_available((8, 6))
    assert not extension.is_available((7, 5))


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["sm_90a"], [(9, 0)], [(8, 9), (10, 0)]),
        (["compute_90"], [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        (["compute_90a"], [(9, 0)], [(10, 0)]),
    ],
)
def test_where_code_runs(monkeypatch, architectures, runs, does_not):
    monkeypatch.setattr(extension, "module", stand_in(*architectures))
    assert all(extension.built_for(capability) for capability in runs)
    assert not any(extension.built_for(capability) for capability in does_not)


def test_gram_supports():
    half, bfloat16, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for capability in ((7, 5), (8, 0), (9, 0), (12, 0)):
        assert all(gram.is_supported(capability, dtype, "fp64") for dtype in (half, bfloat16, single, double))
        assert all(gram.is_supported(capability, dtype, "exact") for dtype in (half, bfloat16, single))
        assert not gram.is_supported(capability, double, "exact")
        assert gram.is_supported(capability, half, "fast")
        assert gram.is_supported(capability, bfloat16, "fast") == (capability >= (8, 0))
        assert not gram.is_supported(capability, single, "fast")
    assert not gram.is_supported((7, 0), half, "fp64")
    with pytest.raises(SliceGPTError, match="gram_: precision must be one of fp64, exact, fast, got 'fp32'"):
        gram.is_supported((8, 0), half, "fp32")
