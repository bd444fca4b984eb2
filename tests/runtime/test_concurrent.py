"""Generations that run at once do not see each other: interleaved, of one batch size, in threads."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from support.sliced_models import LENGTHS, network
from support.tiny_models import left_padding, token_ids
from transformers import TextStreamer

from slicegpt.runtime import Runtime, Sampling
from slicegpt.runtime.leases import MAX_IDLE, CachePool

NEW = 9
DECODERS = ["auto", "growing", "static"]  # "static" is what a CUDA graph captures


def greedy(plain, ids, mask=None, new: int = NEW) -> torch.Tensor:
    """Transformers' own tokens [batch, new], the reference: nothing of the runtime is in them."""
    mask = torch.ones_like(ids) if mask is None else mask
    arguments = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return plain.generate(ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]


def gathered(*streams) -> list[torch.Tensor]:
    """The tokens [batch, new] of several streams that take turns."""
    return [torch.stack(tokens, dim=1) for tokens in zip(*zip(*streams, strict=True), strict=True)]


@pytest.fixture(scope="module")
def plain():
    return network("llama", "compact", torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt"])
def test_interleaved_streams(case, decoder):
    """Three of one batch size, of other lengths, one of them padded; the second takes more than the first's cache."""
    plain = network(case, "compact", torch.float32)
    runtime = Runtime(plain, decoder=decoder)
    prompts = [(token_ids(3, 12, seed=1), None), (token_ids(3, 30, seed=2), None)]
    prompts.append(left_padding(token_ids(3, 12, seed=3), LENGTHS))
    streams = [runtime.stream(ids, mask, NEW, ignore_eos=True) for ids, mask in prompts]
    for actual, (ids, mask) in zip(gathered(*streams), prompts, strict=True):
        assert torch.equal(actual, greedy(plain, ids, mask))


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_calls_between_two_tokens_of_a_stream(plain, decoder):
    runtime, ids, others = Runtime(plain, decoder=decoder), token_ids(2), token_ids(2, 20, seed=5)
    expected, alone = greedy(plain, ids), plain(others).logits
    tokens = []
    for token in runtime.stream(ids, max_new_tokens=NEW, ignore_eos=True):
        tokens.append(token)
        assert torch.equal(runtime.generate(others, max_new_tokens=2)[:, :20], others)
        # Float32: some hundred roundings of 6e-8, of logits of size 1.
        assert torch.allclose(runtime.logits(others), alone, atol=1e-4)
    assert torch.equal(torch.stack(tokens, dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_draws_of_interleaved_streams_follow_their_own_seeds(plain, decoder):
    """Each draws what it draws in a runtime of its own; without a seed they differ."""
    sampling = Sampling(do_sample=True, temperature=2.0)
    arguments = {"max_new_tokens": NEW, "sampling": sampling, "ignore_eos": True}
    ids, runtime = token_ids(2), Runtime(plain, decoder=decoder)
    alone = [
        torch.stack(list(Runtime(plain, decoder=decoder).stream(ids, seed=seed, **arguments)), dim=1)
        for seed in (1, 2)
    ]
    assert not torch.equal(*alone)
    together = gathered(*(runtime.stream(ids, seed=seed, **arguments) for seed in (1, 2)))
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert not torch.equal(*gathered(*(runtime.stream(ids, **arguments) for _ in range(2))))
    # Without a seed the draws follow from the last one, so that a program draws the same every time.
    following = [
        [runtime.generate(ids, seed=seed, **arguments) for seed in (3, None, None)][1:] for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*following, strict=True))
    assert not torch.equal(*following[0])


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_threads(plain, decoder):
    """Four threads, of equal and of other batch sizes, some of which give their caches back while others run."""
    runtime = Runtime(plain, decoder=decoder)
    prompts = [token_ids(1 + seed % 3, 6 + seed, seed=seed) for seed in range(12)]
    expected = [greedy(plain, ids) for ids in prompts]
    wait = threading.Barrier(4)

    def work(index: int) -> torch.Tensor:
        if index < 4:
            wait.wait()
        ids = prompts[index]
        return runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True)[:, ids.shape[1] :]

    with ThreadPoolExecutor(4) as threads:
        actual = list(threads.map(work, range(len(prompts))))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


class Allocations:
    """Counts the caches that a runtime allocates: how many there were, and which are alive."""

    def __init__(self, runtime: Runtime):
        self.made, self.alive, self.new_cache = 0, set(), runtime.new_cache
        runtime.new_cache = self.allocate

    def allocate(self, batch: int, length: int):
        cache = self.new_cache(batch, length)
        self.made += 1
        self.alive.add(address := cache.keys.data_ptr())
        weakref.finalize(cache, self.alive.discard, address)
        return cache


def test_memory_is_bounded_by_what_runs_at_once(plain):
    runtime = Runtime(plain)
    memory, pool = Allocations(runtime), CachePool(runtime.device)

    def lease(batch: int, length: int):
        return pool.lease(batch, length, memory.allocate)

    for batch in (1, 2, 3, 4, 5, 6) * 2:
        with lease(batch, 30):
            assert len(memory.alive) <= MAX_IDLE
    gc.collect()
    assert len(memory.alive) == MAX_IDLE
    made = memory.made
    for length in (30, 64, 10):  # what is kept is used again
        with lease(6, length) as held:
            assert held.cache.capacity == 64
    assert memory.made == made
    with lease(6, 65) as held:  # longer: it takes the place of the shorter one
        gc.collect()
        assert held.cache.capacity == 128
        assert len(memory.alive) == MAX_IDLE
    with ExitStack() as stack:
        assert len({id(stack.enter_context(lease(1, 30)).cache) for _ in range(7)}) == 7
    del held
    gc.collect()
    assert len(memory.alive) == MAX_IDLE


@torch.no_grad()
@pytest.mark.parametrize("end", ["closed", "collected", "failed"])
def test_a_stream_left_before_its_end_gives_its_cache_back(plain, end, tiny_tokenizer):
    runtime, ids = Runtime(plain), token_ids(2)
    memory = Allocations(runtime)
    for _ in range(3):
        if end == "failed":
            with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
                runtime.generate(ids, max_new_tokens=8, streamer=LateStreamer(tiny_tokenizer))
            continue
        stream = runtime.stream(ids, max_new_tokens=NEW)
        next(stream)
        if end == "closed":
            stream.close()
        del stream
        gc.collect()
    assert memory.made == 1
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True)[:, 12:], greedy(plain, ids))


class LateStreamer(TextStreamer):
    """Refuses a batch at its first token, not at the prompt."""

    def put(self, value):
        if value.dim() == 1:
            super().put(value[:, None].expand(-1, 2))


# --- the GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("decoder", ["auto", "static", "growing"])
def test_interleaved_streams_on_cuda_streams(decoder):
    """Two generations on CUDA streams of their own, and the caches then change streams; current streams change too."""
    plain = network("llama", "compact", torch.float32).cuda()
    runtime = Runtime(plain, decoder=decoder)
    prompts = [token_ids(3, 12, seed=seed).cuda() for seed in range(4)]
    expected = [greedy(plain, ids).cpu() for ids in prompts]
    side = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for first in (0, 2):
        streams = []
        for index in (0, 1):
            with torch.cuda.stream(side[(index + first // 2) % 2]):
                streams.append(runtime.stream(prompts[first + index], max_new_tokens=NEW, ignore_eos=True))
        for index, actual in enumerate(gathered(*streams)):
            assert torch.equal(actual, expected[first + index])
