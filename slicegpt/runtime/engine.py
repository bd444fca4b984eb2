"""`Runtime`: prefill in chunks, then generation, on packed weights and a preallocated cache."""

from collections.abc import Iterator

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
    Decoder,
    FusedDecoder,
    GraphDecoder,
    GrowingDecoder,
    StaticDecoder,
    tokens_on_host,
)
from slicegpt.runtime.executor import Network
from slicegpt.runtime.packing import pack, position_limit
from slicegpt.runtime.sampling import Sampling

DECODERS = {"growing": GrowingDecoder, "fused": FusedDecoder, "static": StaticDecoder, "graph": GraphDecoder}

# The cache grows by so many tokens, so that prompts of similar lengths share one, and a captured graph.
CAPACITY_STEP = 64
# Batch sizes whose caches and captured graphs are kept; the one that was made first goes first.
MAX_BATCH_SIZES = 4
MAX_DECODERS = 4


class Runtime:
    """Generates with a sliced model, or a dense one of a supported family, faster than the plain form.

    Same function as the plain model: its logits up to rounding. On a GPU a token is one CUDA graph; batches are padded
    on the left.

    Args:
        model: `SlicedForCausalLM`, or a dense Hugging Face model (its norms are folded first, which takes a copy).
        max_length: tokens of prompt and answer together; the model's `max_position_embeddings` where not given, or the
            length up to which its LongRoPE keeps its frequencies.
        prefill_chunk: tokens of a row that pass the network at a time.
        release: take the layers' weights out of `model` while they are packed, which saves a copy; `model` cannot be
            used afterwards.
        decoder: "auto", "growing", "fused", "static" or "graph"; see `slicegpt.runtime.decoding`. "auto" is "graph" on
            a GPU; on a CPU "fused" where its kernels are built and for batches they are fastest at, else "growing".

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
        self.network = Network(pack(canonical, self.max_length, release or canonical is not model))
        self.device = self.network.packed.device
        self.decoder = decoder
        self._caches: dict[int, KVCache] = {}
        self._decoders: dict[int, dict[tuple, Decoder]] = {}  # of each batch size
        self._generator = torch.Generator(self.device)
        generation = getattr(model, "generation_config", None)
        self.stop_ids = _as_ids(getattr(generation, "eos_token_id", None), self.config.eos_token_id)
        pads = _as_ids(getattr(generation, "pad_token_id", None), self.config.pad_token_id)
        self.pad_id = (pads or self.stop_ids or (0,))[0]

    def bytes_per_token(self, batch: int = 1) -> int:
        """Bytes of weights that one step of `batch` sequences moves from memory, head included, cache not."""
        return self.network.packed.bytes_per_token(batch)

    # --- logits ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, vocab_size] of every position; those of padding mean nothing."""
        input_ids, mask = self._checked(input_ids, attention_mask, 0)
        cache = self._cache_for(len(input_ids), input_ids.shape[1], mask)
        pieces = [
            self.network.logits(stream, sums).unflatten(0, (len(input_ids), -1))
            for stream, sums in self._prefill(input_ids, mask, cache)
        ]
        return torch.cat(pieces, dim=1)

    def _prefill(
        self, input_ids: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Fill the cache chunk by chunk; yields the last boundary's stream [batch * chunk, d] and its sums."""
        length = input_ids.shape[1]
        positions = _positions(input_ids, mask)
        for start in range(0, length, self.prefill_chunk):
            columns = slice(start, min(start + self.prefill_chunk, length))
            ids, places = input_ids[:, columns], positions[:, columns]
            angles = self.network.angles(places)
            step = GrowingStep(cache, ids.shape[1], angles, start, mask is not None)
            with kernels_for_new_shapes(self.device):
                past = self.network.blocks(self.network.embed(ids, places), step)
            yield past

    @torch.inference_mode()
    def _last_logits(self, input_ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        for stream, sums in self._prefill(input_ids, mask, cache):
            last = stream.unflatten(0, (len(input_ids), -1))[:, -1]
            # A CPU's kernels, called without the operator's checks, read sums of consecutive rows.
            last_sums = None if sums is None else sums.unflatten(0, (len(input_ids), -1))[:, -1].contiguous()
        return self.network.logits(last, last_sums)

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
            seed: of the draws; None continues where the last call ended.
            ignore_eos: go on behind end-of-sequence tokens.

        Raises:
            SliceGPTError: shapes, padding on the right, or more tokens than `max_length`.
        """
        if max_new_tokens < 1:
            raise SliceGPTError(f"must be at least 1, got {max_new_tokens}", "max_new_tokens")
        input_ids, mask = self._checked(input_ids, attention_mask, max_new_tokens)
        return self._stream(
            input_ids, mask, max_new_tokens, sampling or Sampling(), seed, () if ignore_eos else self.stop_ids
        )

    def _stream(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        count: int,
        sampling: Sampling,
        seed: int | None,
        stop_ids: tuple[int, ...],
    ) -> Iterator[Tensor]:
        batch, length = input_ids.shape
        cache = self._cache_for(batch, length + count, mask)
        decoder = self._decoder_for(cache, sampling, stop_ids)
        if seed is not None:
            self._generator.manual_seed(seed)
        logits = self._last_logits(input_ids, mask, cache)
        position = _positions(input_ids, mask)[:, -1] + 1
        first = decoder.start(logits, position, length, mask is not None)
        finished = torch.zeros(batch, dtype=torch.bool)
        stops = torch.tensor(stop_ids, dtype=torch.long)
        for token in tokens_on_host(decoder, first, count):
            yield token
            if stop_ids:
                finished |= torch.isin(token, stops)
                if finished.all():
                    return

    # --- what is kept between calls ----------------------------------------------------------------------------

    @torch.inference_mode()
    def _cache_for(self, batch: int, length: int, mask: Tensor | None) -> KVCache:
        """The batch size's cache, of at least this capacity, whose `valid` says what `mask` does."""
        cache = self._caches.get(batch)
        if cache is None or cache.capacity < length:
            # Captured graphs point into the cache they were made with.
            self._forget(batch)
            if len(self._caches) >= MAX_BATCH_SIZES:
                self._forget(next(iter(self._caches)))
            cache = self.new_cache(batch, length)
            self._caches[batch], self._decoders[batch] = cache, {}
        cache.valid.fill_(True)
        if mask is not None:
            cache.valid[:, : mask.shape[1]] = mask
        return cache

    def _decoder_for(self, cache: KVCache, sampling: Sampling, stop_ids: tuple[int, ...]) -> Decoder:
        decoders, key = self._decoders[cache.batch], (sampling, stop_ids)
        if key not in decoders:
            if len(decoders) >= MAX_DECODERS:
                decoders.pop(next(iter(decoders)))
            decoders[key] = self.new_decoder(cache, sampling, stop_ids)
        return decoders[key]

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` rows of at least `length` tokens."""
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        return KVCache.allocate(self.config, batch, capacity, self.network.packed.dtype, self.device)

    def new_decoder(self, cache: KVCache, sampling: Sampling, stop_ids: tuple[int, ...] = ()) -> Decoder:
        """What generates into this cache."""
        make = DECODERS[self.decoder_name(cache.batch)]
        return make(self.network, cache, sampling, stop_ids, self.pad_id, self._generator)

    def decoder_name(self, batch: int) -> str:
        """Which of `DECODERS` generates for so many rows."""
        dtype = self.network.packed.dtype
        fused = not self.network.through_operators and CpuStep.is_supported(self.network.packed, batch)
        if self.decoder == "auto":
            return "graph" if self.device.type == "cuda" else "fused" if fused else "growing"
        if self.decoder == "fused" and not fused:
            raise SliceGPTError(
                f"'fused' needs the CPU's kernels ({cpu_extension.why_not() or 'they are there'}), "
                f"SLICEGPT_BACKEND=auto, float16, bfloat16 or float32 and "
                f"{cpu_gemm.rows_text(cpu_gemm.most_rows(dtype))}, got {batch} of {dtype} on {self.device}",
                "decoder",
            )
        return self.decoder

    def _forget(self, batch: int) -> None:
        self._caches.pop(batch, None)
        self._decoders.pop(batch, None)

    def _checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """Ids on the device, and the mask as bool; None where nothing is padded."""
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
    """Positions [batch, tokens] that count what is not padding; padding has -1."""
    if mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, -1)


def _as_ids(*values: int | list[int] | None) -> tuple[int, ...]:
    """The first of the values that is given, as a tuple of ids."""
    for value in values:
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (value,)
    return ()
