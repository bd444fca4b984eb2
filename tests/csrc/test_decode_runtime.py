"""The runtime on the decode kernels: greedy tokens of compact models, with and without the factor read from L2."""

from threading import get_ident

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import tiny_model, token_ids

from slicegpt.ops.contracts import NormLinearInputs
from slicegpt.ops.cuda import decode as cuda_decode
from slicegpt.ops.cuda import extension
from slicegpt.runtime import Runtime
from slicegpt.runtime.executor import Executor

NEW = 5


@pytest.fixture
def kernels(backend, monkeypatch):
    """The backend, if it is the emulation: on a GPU the runtime's own tests go through the kernels."""
    if backend.device != "cpu":
        pytest.skip("tests/runtime does this on a GPU")
    small = cuda_decode.DecodeDevice(multiprocessors=3, l2_bytes=1 << 20, overlap=False)
    monkeypatch.setattr(cuda_decode, "decode_device", lambda device: small)
    return backend


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_tokens(kernels, case):
    """Same width, and to a wider last boundary; the logits of float32 sums in another order, the same tokens."""
    plain = sliced(tiny_model(case, torch.float32), widths=36, dtype=torch.float32)[0]
    ids = token_ids(2, 6)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(ids, use_cache=False, **options)
    read = []

    def rotate_add(a, weight, h, shortcut, bias, factor=None):
        read.append(factor is not None and cuda_decode.takes_factor(weight, factor))
        if read[-1]:  # then these columns are not looked at
            weight = weight.clone()
            weight[:, weight.shape[1] - len(factor) :] = torch.nan
        return cuda_decode.rotate_add(a, weight, h, shortcut, bias, factor)

    runtime = Runtime(plain, prefill_chunk=6, decoder="static")
    runtime.executor = Executor(runtime.executor.packed, through_operators=True)
    runtime.executor.norm_linear = lambda *arguments: cuda_decode.norm_linear(NormLinearInputs(*arguments))
    runtime.executor.rotate_add = rotate_add
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True), expected)
    assert any(read)
    runtime.executor.rotate_add = lambda *arguments: cuda_decode.rotate_add(*arguments[:5])
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True), expected)


def test_counters_are_allocated_by_another_thread(monkeypatch):
    """A graph's pool takes what its thread allocates; the counters outlive it. Launches of one stream share theirs."""
    zeros, threads = torch.zeros, []

    def recorded(*arguments, **options):
        threads.append(get_ident())
        return zeros(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", recorded)
    monkeypatch.setattr(extension, "current_stream", lambda like: 7)
    arrivals, like = cuda_decode.Arrivals(torch.device("cpu")), torch.ones(1)
    first = arrivals.take(100, like)
    assert len(threads) == 2  # the pool for captured launches, and this stream's
    assert get_ident() not in threads
    assert arrivals.take(1024, like) == first
    monkeypatch.setattr(extension, "current_stream", lambda like: 8)
    # Another stream's launch may run at the same time.
    assert abs(arrivals.take(1024, like) - first) >= 4 * 1024
    monkeypatch.setattr(extension, "capturing", lambda like: True)
    captured = [arrivals.take(10, like) for _ in range(3)]
    assert [address - captured[0] for address in captured] == [0, 40, 80]
    assert len(threads) == 3
