"""`Runtime`: prefill in chunks, then generation, on packed weights and a preallocated cache."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from slicegpt.conversion.canonical import to_canonical
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.devices import kernels_for_new_shapes
from slicegpt.ops.cpu import extension as cpu_extension
from slicegpt.ops.cpu import gemm as cpu_gemm
from slicegpt.runtime.cache import GrowingStep, KVCache
from slicegpt.runtime.cpu_step import CpuStep
from slicegpt.runtime.decoding import (
    BatchDecoder,
    FusedDecoder,
    GraphDecoder,
    GrowingDecoder,
    StaticDecoder,
    tokens_on_host,
)
from slicegpt.runtime.executor import Executor
from slicegpt.runtime.leases import CacheLease, CachePool
from slicegpt.runtime.packing import pack, position_limit, weight_reader
from slicegpt.runtime.sampling import Sampling
from slicegpt.runtime.session import Session

DECODERS = {"growing": GrowingDecoder, "fused": FusedDecoder, "static": StaticDecoder, "graph": GraphDecoder}

# Cache capacities are multiples of it, so that prompts of similar lengths share a cache and a captured graph.
CAPACITY_STEP = 64


class Runtime:
    """Generates with a sliced model, or a dense one of a supported family, faster than transformers' `generate`.

    The logits are those of the plain model up to rounding. On a GPU a token is one launch of a CUDA graph. Batches are
    padded on the left.

    Any number of generations may run at once, interleaved or in threads. Each holds a cache of its own from its first
    token to its end: 2 * batch * key heads of all layers * capacity * head_dim numbers (`KVCache.bytes`). A stream that
    is not read to its end returns its cache when it is closed or garbage-collected. Up to four unused caches are kept
    for later calls. On a GPU a generation stays on the CUDA stream that was current when it was called.

    Args:
        model: `SlicedForCausalLM`, or a dense Hugging Face model (its norms are folded first, which takes a copy).
        max_length: tokens of prompt and answer together; the model's `max_position_embeddings` where not given, or the
            length up to which its LongRoPE keeps its frequencies.
        prefill_chunk: tokens of each row in one forward pass over a prompt.
        release: free each layer's weights in `model` once they are packed, so that they are never held twice; `model`
            cannot be used afterwards.
        decoder: "auto", "growing", "fused", "static" or "graph"; see `slicegpt.runtime.decoding`. "auto" is "graph" on
            a GPU; on a CPU "fused" where its kernels are built, up to the batch size at which they are fastest, else
            "growing".
        weights: "int8" or "int4" rounds the weights to nearest as they are packed, on a CPU with the compiled kernels:
            another, worse model of fewer bytes, to measure or to try (see `slicegpt.runtime.rounding`). None runs the
            model as it is; weights that it stores with 8 or 4 bits stay that.

    Raises:
        SliceGPTError: a model that the fused operators cannot run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int | None = None,
        prefill_chunk: int = 512,
        release: bool = False,
        decoder: str = "auto",
        weights: str | None = None,
    ):
        if decoder not in ("auto", *DECODERS):
            raise SliceGPTError(f"must be one of auto, {', '.join(DECODERS)}, got {decoder!r}", "decoder")
        if prefill_chunk < 1:
            raise SliceGPTError(f"must be at least 1, got {prefill_chunk}", "prefill_chunk")
        canonical = to_canonical(model)
        self.config = canonical.config
        limit, reason = position_limit(self.config)
        if max_length is not None and max_length < 1:
            raise SliceGPTError(f"must be at least 1, got {max_length}", "max_length")
        if max_length is not None and max_length > limit and reason is not None:
            raise SliceGPTError(f"must be at most {limit}, {reason}, got {max_length}", "max_length")
        self.max_length = max_length or limit
        self.prefill_chunk = prefill_chunk
        reader = weight_reader(canonical, weights)
        release = release or canonical is not model
        self.executor = Executor(pack(canonical, self.max_length, release, reader))
        self.device = self.executor.packed.device
        self.decoder = decoder
        self._pool = CachePool(self.device, self.executor.packed)
        self._seeds = torch.Generator()
        generation = getattr(model, "generation_config", None)
        self.stop_ids = _as_ids(getattr(generation, "eos_token_id", None), self.config.eos_token_id)
        pads = _as_ids(getattr(generation, "pad_token_id", None), self.config.pad_token_id)
        self.pad_id = (pads or self.stop_ids or (0,))[0]

    def bytes_per_token(self, batch: int = 1) -> int:
        """Bytes of weights that one step of `batch` sequences moves from memory, head included, cache not."""
        return self.executor.packed.bytes_per_token(batch)

    # --- logits ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, vocab_size] of every position; those of padding mean nothing."""
        input_ids, mask = self.checked(input_ids, attention_mask, 0)
        with self._pool.lease(*input_ids.shape, self.new_cache, self._current_stream()) as lease:
            lease.cache.mark(mask)
            pieces = [
                self.executor.logits(stream, sums).unflatten(0, (len(input_ids), -1))
                for stream, sums in self._prefill(input_ids, mask, lease.cache)
            ]
            return torch.cat(pieces, dim=1)

    def _prefill(
        self, input_ids: Tensor, mask: Tensor | None, cache: KVCache, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Fill the cache chunk by chunk; yields `Executor.blocks` of each: stream [batch * chunk, d] and its sums.

        first: tokens of the prompt whose keys and values are in the cache already.
        """
        length = input_ids.shape[1]
        positions = _positions(input_ids, mask)
        for start in range(first, length, self.prefill_chunk):
            columns = slice(start, min(start + self.prefill_chunk, length))
            ids, places = input_ids[:, columns], positions[:, columns]
            angles = self.executor.angles(places)
            step = GrowingStep(cache, ids.shape[1], angles, start, mask is not None)
            with kernels_for_new_shapes(self.device):
                past = self.executor.blocks(self.executor.embed(ids, places), step)
            yield past

    @torch.inference_mode()
    def _last_logits(self, input_ids: Tensor, mask: Tensor | None, cache: KVCache, first: int = 0) -> Tensor:
        for stream, sums in self._prefill(input_ids, mask, cache, first):
            last = stream.unflatten(0, (len(input_ids), -1))[:, -1]
            # The CPU's kernels, which are called without the operator's checks, read contiguous sums.
            last_sums = None if sums is None else sums.unflatten(0, (len(input_ids), -1))[:, -1].contiguous()
        return self.executor.logits(last, last_sums)

    # --- generation --------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> Tensor:
        """Prompt and answer, [batch, prompt + new tokens] int64 on the model's device; see `stream`.

        streamer: what transformers' `generate` takes, told the same: `put(prompt)` [batch, tokens] before anything is
        computed, `put(token)` [batch] for every token as it comes, `end()`, all on the host. How many rows it takes it
        knows itself: `TextStreamer` raises a ValueError for more than one.
        """
        tokens = self.stream(input_ids, attention_mask, max_new_tokens, sampling, seed, ignore_eos)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        new = []
        with closing(tokens):  # the streamer may raise
            for token in tokens:
                if streamer is not None:
                    streamer.put(token)
                new.append(token)
        if streamer is not None:
            streamer.end()
        return torch.cat((input_ids.to(self.device), torch.stack(new, dim=1).to(self.device)), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the new tokens one by one, int64 [batch] on the host.

        Args:
            input_ids: [batch, tokens], at least one token.
            attention_mask: [batch, tokens], 0 where a row is padded, on its left.
            max_new_tokens: at least 1. It ends earlier once every row has met an end-of-sequence token; rows that
                have get padding.
            sampling: greedy where not given.
            seed: of the draws; None continues the sequence of seeds that the last given one began.
            ignore_eos: go on after end-of-sequence tokens.

        Raises:
            SliceGPTError: shapes, padding on the right, or more tokens than `max_length`.
        """
        if max_new_tokens < 1:
            raise SliceGPTError(f"must be at least 1, got {max_new_tokens}", "max_new_tokens")
        input_ids, mask = self.checked(input_ids, attention_mask, max_new_tokens)
        stop_ids = () if ignore_eos else self.stop_ids
        return self._stream(
            input_ids, mask, max_new_tokens, sampling or Sampling(), seed, stop_ids, self._current_stream()
        )

    @contextmanager
    def session(self, length: int, sampling: Sampling | None = None) -> Iterator[Session]:
        """A conversation on one cache of at least `length` tokens, which is lent until the context ends."""
        with self._pool.lease(1, length, self.new_cache, self._current_stream()) as lease:
            yield Session(self, lease, sampling or Sampling())

    def _current_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _stream(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        count: int,
        sampling: Sampling,
        seed: int | None,
        stop_ids: tuple[int, ...],
        stream: torch.cuda.Stream | None,
    ) -> Iterator[Tensor]:
        batch, length = input_ids.shape
        with self._pool.lease(batch, length + count, self.new_cache, stream) as lease:
            with lease.on_stream():
                decoder, first = self.started(lease, input_ids, mask, sampling, seed, stop_ids)
            finished = torch.zeros(batch, dtype=torch.bool)
            stops = torch.tensor(stop_ids, dtype=torch.long)
            for token in tokens_on_host(decoder, first, count, lease.on_stream):
                yield token
                if stop_ids:
                    finished |= torch.isin(token, stops)
                    if finished.all():
                        return

    def started(
        self,
        lease: CacheLease,
        input_ids: Tensor,
        mask: Tensor | None,
        sampling: Sampling,
        seed: int | None,
        stop_ids: tuple[int, ...],
        cached: int = 0,
    ) -> tuple[BatchDecoder, Tensor]:
        """The lease's decoder after the prompt, and the first token [batch].

        cached: tokens that the prompt begins with and whose keys and values the lease's cache holds, fewer than all.
        """
        cache = lease.cache
        decoder = lease.decoder(
            (sampling, stop_ids), lambda: self.new_decoder(cache, sampling, stop_ids, lease.generator)
        )
        # Every lease has a generator of its own, so that a seed gives the same tokens whatever else is running.
        if seed is None:
            seed = int(torch.randint(1 << 62, (1,), generator=self._seeds))
        else:
            self._seeds.manual_seed(seed)
        lease.generator.manual_seed(seed)
        # After the decoder was made: capturing its graph writes to the cache.
        cache.mark(mask)
        logits = self._last_logits(input_ids, mask, cache, cached)
        position = _positions(input_ids, mask)[:, -1] + 1
        return decoder, decoder.start(logits, position, input_ids.shape[1], mask is not None)

    # --- parts of a generation ---------------------------------------------------------------------------------

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` rows of at least `length` tokens."""
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        return KVCache.allocate(self.config, batch, capacity, self.executor.packed.dtype, self.device)

    def new_decoder(
        self,
        cache: KVCache,
        sampling: Sampling,
        stop_ids: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> BatchDecoder:
        """A decoder of this cache; it draws from `generator`, which is on the runtime's device."""
        make = DECODERS[self.decoder_name(cache.batch)]
        generator = generator or torch.Generator(self.device)
        return make(self.executor, cache, sampling, stop_ids, self.pad_id, generator)

    def decoder_name(self, batch: int) -> str:
        """The name in `DECODERS` of what generates for so many rows."""
        dtype = self.executor.packed.dtype
        fused = not self.executor.through_operators and CpuStep.is_supported(self.executor.packed, batch)
        if self.decoder == "auto":
            return "graph" if self.device.type == "cuda" else "fused" if fused else "growing"
        if self.decoder == "fused" and not fused:
            if any(block.mixture is not None for block in self.executor.packed.blocks):
                raise SliceGPTError("'fused' has no mixtures of experts; take auto or growing", "decoder")
            raise SliceGPTError(
                f"'fused' needs the CPU's kernels ({cpu_extension.why_not() or 'they are there'}), "
                f"SLICEGPT_BACKEND=auto, float16, bfloat16 or float32 and "
                f"{cpu_gemm.rows_text(cpu_gemm.most_rows(dtype))}, got {batch} of {dtype} on {self.device}",
                "decoder",
            )
        return self.decoder

    def checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """The ids on the device, and the mask as bool, or None where nothing is padded."""
        if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise SliceGPTError(
                f"must be integers [batch, tokens], at least one, got {list(input_ids.shape)} "
                f"of {input_ids.dtype}",
                "input_ids",
            )
        length = input_ids.shape[1]
        if length + new_tokens > self.max_length:
            raise SliceGPTError(
                f"{length} tokens and {new_tokens} new ones exceed max_length {self.max_length}",
                "max_new_tokens",
            )
        vocabulary = self.config.vocab_size
        if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocabulary:
            raise SliceGPTError(
                f"must lie in [0, {vocabulary}), got {int(input_ids.min())} to {int(input_ids.max())}",
                "input_ids",
            )
        input_ids = input_ids.to(self.device, torch.long)
        if attention_mask is None:
            return input_ids, None
        if attention_mask.shape != input_ids.shape:
            raise SliceGPTError(
                f"must be {list(input_ids.shape)} as input_ids, got {list(attention_mask.shape)}",
                "attention_mask",
            )
        mask = attention_mask.to(self.device).bool()
        if not bool(mask[:, -1].all() and (mask[:, 1:] | ~mask[:, :-1]).all()):
            raise SliceGPTError("must be padded on the left only, got another pattern", "attention_mask")
        return input_ids, None if bool(mask.all()) else mask


def _positions(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions [batch, tokens], counted from the first token that is not padding; those of padding are -1."""
    if mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, -1)


def _as_ids(*values: int | list[int] | None) -> tuple[int, ...]:
    """The first value that is not None, as a tuple of ids."""
    for value in values:
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (value,)
    return ()
