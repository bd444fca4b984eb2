"""Memory that generations on several CUDA streams use in turn: no two accesses that could run at once.

`FakeCuda` (tests/support/cuda_streams.py) stands for the GPU.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
from support.cuda_streams import FakeCuda, Stream

from slicegpt.ops.lasting import made_to_last
from slicegpt.runtime.leases import CacheLease, CachePool

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch, "Generator", lambda device: None)
    return fake


def two_streams_in_turn(cuda: FakeCuda) -> None:
    """Packing on one stream, four generations on two others, and then the allocator lends all memory again."""
    weights, states = torch.zeros(4), torch.zeros(8)
    cuda.access(weights, "packing", True)
    pool = CachePool(DEVICE, weights)
    cache = SimpleNamespace(batch=1, capacity=64)
    for stream in [Stream(cuda), Stream(cuda)] * 2:
        with pool.lease(1, 64, lambda batch, length: cache, stream) as lease, lease.on_stream():
            assert lease.cache is cache
            cuda.access(weights, "a step's reading of weights", False)
            cuda.access(states, "a step's writing into the cache", True)
    del lease, pool
    cuda.access(states, "the memory's next owner", True)
    cuda.access(weights, "the memory's next owner", True)


def test_generations_take_turns(cuda):
    two_streams_in_turn(cuda)
    assert cuda.races == []


@pytest.mark.parametrize("forgotten", ["begin", "end", "wait"])
def test_an_order_that_is_forgotten_is_a_race(cuda, monkeypatch, forgotten):
    """The check above sees each of the things that a lease does for it."""
    if forgotten == "begin":
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    elif forgotten == "end":
        monkeypatch.setattr(CacheLease, "end", lambda self: None)
    else:
        monkeypatch.setattr(CacheLease, "wait", lambda self: None)
    two_streams_in_turn(cuda)
    assert cuda.races


def test_the_weights_live_as_long_as_a_cache_in_use(cuda):
    """A runtime that is dropped while its last step runs."""
    pool = CachePool(DEVICE, weights := SimpleNamespace())
    with pool.lease(1, 64, lambda *_: SimpleNamespace(batch=1, capacity=64), Stream(cuda)) as lease:
        assert lease._weights is weights


def test_lasting_memory_is_whole_before_any_stream_takes_it(monkeypatch):
    """Made by another thread, whose stream is waited for; of the device that was asked for."""
    seen = []
    stream = SimpleNamespace(synchronize=lambda: seen.append(threading.get_ident()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: seen.append(device) or stream)

    def make():
        seen.append("made")
        return threading.get_ident()

    other = made_to_last(make, DEVICE)
    assert other != threading.get_ident()
    assert seen == ["made", DEVICE, other]
