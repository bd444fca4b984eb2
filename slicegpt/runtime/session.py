"""A conversation: prompts that begin alike, on one cache that keeps what they have in common."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.runtime.decoding import BatchDecoder, tokens_on_host
from slicegpt.runtime.leases import CacheLease
from slicegpt.runtime.sampling import Sampling


class PromptRunner(Protocol):
    """What a session needs of `Runtime`, which makes sessions and so cannot be imported here."""

    max_length: int
    stop_ids: tuple[int, ...]

    def checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int
    ) -> tuple[Tensor, Tensor | None]: ...

    def started(
        self,
        lease: CacheLease,
        input_ids: Tensor,
        mask: Tensor | None,
        sampling: Sampling,
        seed: int | None,
        stop_ids: tuple[int, ...],
        cached: int = 0,
    ) -> tuple[BatchDecoder, Tensor]: ...


class Session:
    """What `Runtime.session` lends: each prompt is computed from the first token on that the last ones did not have.

    In a chat that is the new message alone. Prompts are compared by their tokens, so that whatever a template or a
    tokenizer does with earlier answers, the result is that of the whole prompt.

    Args:
        lease: of one row; held as long as the session is used.
    """

    def __init__(self, runtime: PromptRunner, lease: CacheLease, sampling: Sampling):
        self._runtime, self._lease, self._sampling = runtime, lease, sampling
        # The tokens whose keys and values are in the cache, in order.
        self._cached: list[int] = []

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer together that there is room for."""
        return min(self._lease.cache.capacity, self._runtime.max_length)

    def stream(self, input_ids: Tensor, max_new_tokens: int = 64, seed: int | None = None) -> Iterator[int]:
        """Yield the new tokens one by one, up to an end-of-sequence token; may be closed at any of them.

        Args:
            input_ids: [1, tokens], the whole prompt; at least one token.
            seed: of the draws; None continues the sequence of seeds that the last given one began.

        Raises:
            SliceGPTError: shapes, or more tokens than `capacity`.
        """
        if max_new_tokens < 1:
            raise SliceGPTError(f"must be at least 1, got {max_new_tokens}", "max_new_tokens")
        if len(input_ids) != 1:
            raise SliceGPTError(f"must be one row, got {list(input_ids.shape)}", "input_ids")
        input_ids, _ = self._runtime.checked(input_ids, None, max_new_tokens)
        if input_ids.shape[1] + max_new_tokens > self.capacity:
            raise SliceGPTError(
                f"{input_ids.shape[1]} tokens and {max_new_tokens} new ones exceed the session's {self.capacity}",
                "max_new_tokens",
            )
        return self._stream(input_ids, max_new_tokens, seed)

    def _stream(self, input_ids: Tensor, count: int, seed: int | None) -> Iterator[int]:
        runtime, lease, ids = self._runtime, self._lease, input_ids[0].tolist()
        # The last token always runs, for its logits.
        known = common_prefix(self._cached, ids[:-1])
        del self._cached[known:]  # what the prompt overwrites, should it be interrupted
        with lease.on_stream():
            decoder, first = runtime.started(
                lease, input_ids, None, self._sampling, seed, runtime.stop_ids, known
            )
        self._cached = ids
        written: int | None = None  # by the step that gave the token after it
        for token in map(int, tokens_on_host(decoder, first, count, lease.on_stream)):
            if written is not None:
                self._cached.append(written)
            written = token
            yield token
            if token in runtime.stop_ids:
                return


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
