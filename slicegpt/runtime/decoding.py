"""Decoding one token after another: the state of a generation stays on the device, and the host does not wait for it.

On a GPU a step is captured once in a CUDA graph and replayed, so that a token costs one launch. What a step decides
(the next token, which rows have finished) stays on the device; the host reads tokens a few steps later.

`StaticDecoder.step`, which the graph captures, is tested on the CPU; the graph itself has not been run on a GPU yet.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from slicegpt.runtime.cache import CacheStep, GrowingStep, KVCache, StaticStep
from slicegpt.runtime.cpu_step import CpuStep
from slicegpt.runtime.executor import Executor
from slicegpt.runtime.sampling import Sampling

# Steps launched before the host reads the oldest token: enough to hide the latency of a launch, and few enough to waste
# when that token ends the text.
RUN_AHEAD = 4

# Captures of several threads take turns: PyTorch's allocator routes allocations to the pools that are being captured.
_CAPTURE = threading.Lock()


class BatchDecoder(ABC):
    """Generates tokens for a batch: `start` returns the first, every `step` the next.

    Args:
        executor: computes logits.
        cache: holds the prompt by the time of `start`.
        sampling: how tokens are chosen.
        stop_ids: token ids that end a row; from then on it gets `pad_id`.
        generator: of the draws, on the network's device.
    """

    def __init__(
        self,
        executor: Executor,
        cache: KVCache,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        pad_id: int,
        generator: torch.Generator,
    ):
        self.executor, self.cache, self.sampling = executor, cache, sampling
        self.generator = generator
        device, batch = executor.packed.device, cache.batch
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self.pad_id = torch.tensor(pad_id, dtype=torch.long, device=device)
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)

    def start(self, logits: Tensor, position: Tensor, slot: int, padded: bool) -> Tensor:
        """Choose the first token [batch] from the prompt's last logits.

        Args:
            logits: [batch, vocab_size].
            position, slot: of that first token: its position in each row, int64 [batch], and its cache slot.
            padded: whether any entry of `cache.valid` is False.
        """
        self.finished.zero_()
        self.position.copy_(position)
        self._choose(logits)
        return self.token

    @abstractmethod
    def step(self) -> Tensor:
        """Run the last token through the network; returns the next, [batch], in a buffer that the next step reuses."""

    def _advance(self, step: CacheStep) -> None:
        stream = self.executor.embed(self.token[:, None], self.position[:, None])
        self._choose(self.executor.logits(*self.executor.blocks(stream, step)))
        self.position += 1

    def _choose(self, logits: Tensor) -> None:
        token = self.sampling.choose(logits, self.generator)
        if len(self.stop_ids):
            token = torch.where(self.finished, self.pad_id, token)
            self.finished |= (token[:, None] == self.stop_ids).any(dim=1)
        self.token.copy_(token)


class GrowingDecoder(BatchDecoder):
    """For the CPU: attention reads the filled part of the cache only."""

    @torch.inference_mode()
    def start(self, logits: Tensor, position: Tensor, slot: int, padded: bool) -> Tensor:
        self.slot, self.padded = slot, padded
        return super().start(logits, position, slot, padded)

    @torch.inference_mode()
    def step(self) -> Tensor:
        angles = self.executor.angles(self.position)
        self._advance(GrowingStep(self.cache, 1, angles, self.slot, self.padded))
        self.slot += 1
        return self.token


class FusedDecoder(GrowingDecoder):
    """For the CPU with compiled kernels: all blocks of a token are one call."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.blocks = CpuStep(self.executor.packed, self.cache)

    @torch.inference_mode()
    def step(self) -> Tensor:
        stream = self.executor.embed(self.token[:, None], self.position[:, None])
        stream = self.blocks.run(stream, self.position, self.slot, self.padded)
        self._choose(self.executor.logits(stream, None))
        self.position += 1
        self.slot += 1
        return self.token


class StaticDecoder(BatchDecoder):
    """Every number that changes is in device memory, so that every token takes the same launches."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.slot = torch.zeros(1, dtype=torch.long, device=self.token.device)

    @torch.inference_mode()
    def start(self, logits: Tensor, position: Tensor, slot: int, padded: bool) -> Tensor:
        self.slot.fill_(slot)
        return super().start(logits, position, slot, padded)

    @torch.inference_mode()
    def step(self) -> Tensor:
        angles = self.executor.angles(self.position)
        self._advance(StaticStep(self.cache, angles, self.slot))
        self.slot += 1
        return self.token


class GraphDecoder(StaticDecoder):
    """`StaticDecoder` captured in a CUDA graph when it is made; the warm-up writes to the cache's slot 0 only."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        stream = torch.cuda.Stream(self.token.device)
        stream.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and workspaces allocated before the capture
                self.slot.zero_()
                self.position.zero_()
                super().step()
        torch.cuda.current_stream(self.token.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        # The stream is named because the cache's device may not be the current one. "thread_local" lets other threads
        # allocate memory during the capture.
        with _CAPTURE, torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            super().step()

    def step(self) -> Tensor:
        self.graph.replay()
        return self.token


def tokens_on_host(
    decoder: BatchDecoder,
    first: Tensor,
    count: int,
    on_stream: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Tensor]:
    """Yield `count` tokens [batch] on the host, the first being `first`; on a GPU, steps run ahead of what is read.

    Args:
        on_stream: returns a context in which the decoder's CUDA stream is current; the caller's current stream may
            change between two tokens.
    """
    if first.device.type == "cpu":
        yield first.clone()
        for _ in range(count - 1):
            yield decoder.step().clone()
        return
    waiting: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for index in range(count):
        with on_stream():
            token = first if index == 0 else decoder.step()
            copy = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            copy.copy_(token, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(first.device))
        waiting.append((copy, event))
        if len(waiting) > RUN_AHEAD:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(copy: Tensor, event: torch.cuda.Event) -> Tensor:
    event.synchronize()
    return copy
