"""Triton's launches, which go to the current device, are made with that of the tensors as the current one."""

import importlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from slicegpt import ops

pytest.importorskip("triton")

F16, F64 = torch.float16, torch.float64
ROWS, WEIGHT = torch.ones(2, 32, dtype=F16), torch.ones(32, 32, dtype=F16)


def attention_arguments():
    keys, values = torch.zeros(2, 2, 1, 64, 16, dtype=F16)
    return torch.ones(2, 48, dtype=F16), keys, values, torch.ones(2, 64) > 0, torch.zeros(1, dtype=torch.long)


# operator -> (its file, the launcher that it imports, a call)
CALLS = {
    "gram_": ("gram", "gram_fp64.gram_fp64", lambda: ops.gram_(torch.zeros(32, 32, dtype=F64), ROWS)),
    "gram_, exact": (
        "gram",
        "gram_exact.gram_exact",
        lambda: ops.gram_(torch.zeros(32, 32, dtype=F64), ROWS, precision="exact"),
    ),
    "cross_gram_": (
        "cross_gram",
        "cross_gram.cross_gram",
        lambda: ops.cross_gram_(torch.zeros(32, 32, dtype=F64), ROWS, ROWS),
    ),
    "norm_linear": (
        "norm_linear",
        "norm_linear.norm_linear",
        lambda: ops.norm_linear(ROWS, WEIGHT, None, None, 32, "none", 32.0, 0.0),
    ),
    "rotate_add": (
        "rotate_add",
        "rotate_add.rotate_add",
        lambda: ops.rotate_add(ROWS, WEIGHT, ROWS, None, None),
    ),
    "decode_attention_": (
        "decode_attention",
        "decode_attention.decode_attention_",
        lambda: ops.decode_attention_(*attention_arguments()),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_tensors_device_is_the_current_one(monkeypatch, name):
    room, launcher, call = CALLS[name]
    module = importlib.import_module(f"slicegpt.ops.{room}")
    current, seen = [], []

    @contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    def launched(*arguments, **_):
        seen.extend(current)
        if name in ("norm_linear", "rotate_add"):
            return ROWS.clone() if name == "norm_linear" else (ROWS.clone(), torch.zeros(2, 1))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(module.DISPATCHER, "choose", lambda *_: "triton")
    file, function = launcher.split(".")
    monkeypatch.setattr(importlib.import_module(f"slicegpt.kernels.{file}"), function, launched)
    if hasattr(module.DISPATCHER, "launcher"):
        monkeypatch.setattr(module.DISPATCHER, "launcher", lambda name: launched)
    if hasattr(module, "decode_device"):
        monkeypatch.setattr(module, "decode_device", lambda device: SimpleNamespace(overlap=False))
    call()
    assert seen == [torch.device("cpu")]
