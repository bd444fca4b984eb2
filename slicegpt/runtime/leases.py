"""Caches lent to generations, so that several may run at once: interleaved, from threads, on several CUDA streams."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from slicegpt.runtime.cache import KVCache
from slicegpt.runtime.decoding import BatchDecoder

# Unused caches that are kept for later generations, with their decoders and captured graphs, and decoders of a cache
# (one for each way of sampling). The least recently used goes first.
MAX_IDLE = 4
MAX_DECODERS = 4


class CacheLease:
    """A cache and its decoders. One generation at a time holds it.

    Attributes:
        cache: keys and values.
        generator: of the draws; captured graphs refer to it.

    Args:
        ready: on a GPU, an event that the first launch waits for, or None.
        weights: what generations read besides; kept until the device has finished with it.
    """

    def __init__(
        self, cache: KVCache, device: torch.device, ready: torch.cuda.Event | None, weights: object = None
    ):
        self._done = ready
        self.cache, self._weights = cache, weights
        self.generator = torch.Generator(device)
        self._stream: torch.cuda.Stream | None = None
        self._decoders: dict[tuple, BatchDecoder] = {}

    def decoder(self, key: tuple, make: Callable[[], BatchDecoder]) -> BatchDecoder:
        """The decoder of this key, made where there is none."""
        decoder = self._decoders.pop(key, None)
        if decoder is None:
            if len(self._decoders) >= MAX_DECODERS:
                self.wait()
                self._decoders.pop(next(iter(self._decoders)))
            decoder = make()
        self._decoders[key] = decoder
        return decoder

    def on_stream(self) -> AbstractContextManager:
        """A context in which the generation's CUDA stream is current."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def begin(self, stream: torch.cuda.Stream | None) -> None:
        """Launch on this stream from now on, after everything that was launched on the previous one."""
        self._stream = stream
        if stream is not None and self._done is not None:
            stream.wait_event(self._done)

    def end(self) -> None:
        """Record an event after all launches: steps that ran ahead of the last token may still be running."""
        if self._stream is not None:
            self._done = torch.cuda.Event()
            self._done.record(self._stream)
            self._stream = None

    def wait(self) -> None:
        """Wait until the device has finished with this memory, before it is freed.

        PyTorch's allocator orders the reuse of memory on the stream that it was allocated on, and on no other.
        """
        if self._done is not None:
            self._done.synchronize()

    def __del__(self) -> None:
        self.wait()


class CachePool:
    """Lends caches, and allocates one where none of the batch size is free.

    A generation holds a cache from its first token to its end. At most `MAX_IDLE` others are kept, so that the number
    of generations that run at once bounds the memory.

    Args:
        device: of the caches. On a GPU, generations on other streams wait for what has been launched on the current
            one: the weights are packed on it.
        weights: the packed network, which caches in use keep alive.
    """

    def __init__(self, device: torch.device, weights: object = None):
        self._device, self._weights = device, weights
        self._idle: list[CacheLease] = []  # the most recently used comes last
        self._ready: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(device))
        # Reentrant, because an abandoned generation ends when it is garbage-collected, which any allocation may start.
        self._lock = threading.RLock()

    @contextmanager
    def lease(
        self,
        batch: int,
        length: int,
        allocate: Callable[[int, int], KVCache],
        stream: torch.cuda.Stream | None = None,
    ) -> Iterator[CacheLease]:
        """A cache of `batch` rows with room for at least `length` tokens; it may hold an earlier generation's.

        Args:
            allocate: (batch, length) -> a new cache. An argument, because a pool that held a method of the runtime
                would form a reference cycle with it, and its memory would outlive the last reference to the runtime.
            stream: on a GPU, the CUDA stream that the generation launches on.
        """
        lease = self._take(batch, length)
        if lease is None:
            with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
                lease = CacheLease(allocate(batch, length), self._device, self._ready, self._weights)
        lease.begin(stream)
        try:
            yield lease
        finally:
            lease.end()
            with self._lock:
                self._idle.append(lease)
                surplus = self._idle[:-MAX_IDLE]
                del self._idle[:-MAX_IDLE]
            for one in surplus:
                one.wait()

    def _take(self, batch: int, length: int) -> CacheLease | None:
        """A free cache that fits, or None; then an unused one is dropped where a new one would be one too many."""
        with self._lock:
            same = [lease for lease in self._idle if lease.cache.batch == batch]
            found = next((lease for lease in reversed(same) if lease.cache.capacity >= length), None)
            # A cache that is too short is replaced, not kept beside the longer one.
            dropped = None if found else next(iter(same), None)
            if found is None and dropped is None and len(self._idle) >= MAX_IDLE:
                dropped = self._idle[0]
            if (taken := found or dropped) is not None:
                self._idle.remove(taken)
        if dropped is not None:
            dropped.wait()
        return found
