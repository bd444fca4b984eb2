"""The key-value cache, and attention of one forward pass on it.

The cache is allocated once. Where the number of cached tokens is a Python number (`GrowingStep`: prefill, and decoding
on a CPU), attention reads a view of the filled part. In a CUDA graph that number is in device memory only
(`StaticStep`), and attention is one operator that reads it there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from slicegpt.modeling import SlicedConfig
from slicegpt.ops import decode_attention_
from slicegpt.ops.torch_attention import attention_states, one_query_attention
from slicegpt.runtime.attention import capped_attention, causal_mask, prompt_attention
from slicegpt.runtime.packed import PackedAttention


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Attributes:
        keys, values: [batch, key heads of all layers, capacity, head_dim].
        valid: [batch, capacity], False on padding.
        heads: key heads of each layer; 0 for one without attention.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    heads: tuple[int, ...]

    @classmethod
    def allocate(
        cls, config: SlicedConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        heads = tuple(config.key_value_heads)
        shape = (batch, sum(heads), capacity, config.head_dim)
        # Zeros, because masked values are still multiplied by 0, and uninitialised memory may hold NaNs.
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.ones((batch, capacity), dtype=torch.bool, device=device), heads)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [batch, key heads, capacity, head_dim]: views."""
        first = sum(self.heads[:layer])
        own = slice(first, first + self.heads[layer])
        return self.keys[:, own], self.values[:, own]

    def of_layers(self, slots: int | slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values in these slots, of each layer: views, made by as few calls as there are tensors."""
        keys, values = (states[:, :, slots].split(self.heads, dim=1) for states in (self.keys, self.values))
        return keys, values

    @torch.inference_mode()
    def mark(self, mask: Tensor | None) -> None:
        """Set `valid` for a new prompt: False where `mask` [batch, tokens] is, True elsewhere and for None."""
        self.valid.fill_(True)
        if mask is not None:
            self.valid[:, : mask.shape[1]] = mask

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.keys, self.values, self.valid))

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


class CacheStep(ABC):
    """Attention and cache of one forward pass: `attend` is called once a layer.

    Args:
        cache: the new tokens' keys and values are written to it.
        tokens: new tokens of each row of the batch.
        angles: cosines and sines [batch * tokens, 1, rotary_dim] of every rotary table.
    """

    def __init__(self, cache: KVCache, tokens: int, angles: list[tuple[Tensor, Tensor]]):
        self.cache = cache
        self.tokens = tokens
        self.angles = angles

    def angles_for(self, attention: PackedAttention) -> tuple[Tensor | None, Tensor | None]:
        """The angles, or None twice for a layer without rotary positions."""
        return (None, None) if attention.rotary is None else self.angles[attention.rotary]

    @abstractmethod
    def attend(self, attention: PackedAttention, rows: Tensor) -> Tensor:
        """[batch * tokens, v | k | q | z] to [batch * tokens, attended | z], which overwrites q in `rows`."""


class GrowingStep(CacheStep):
    """A pass whose first cache slot is a Python number.

    Args:
        start: number of tokens in the cache, padding included; the new ones are written from there on.
        padded: whether any entry of `cache.valid` is False.
    """

    def __init__(
        self,
        cache: KVCache,
        tokens: int,
        angles: list[tuple[Tensor, Tensor]],
        start: int,
        padded: bool,
    ):
        super().__init__(cache, tokens, angles)
        self.start, self.stop = start, start + tokens
        self.padded = padded
        self._masks: dict[int | None, Tensor | None] = {}
        self._views: dict[int | None, tuple] = {}
        if (
            tokens == 1
        ):  # views of all layers at once, since the number of calls is what a token costs on a CPU
            self._new = cache.of_layers(start)

    def attend(self, attention: PackedAttention, rows: Tensor) -> Tensor:
        heads, key_heads, size = attention.heads, attention.key_heads, attention.head_dim
        cos, sin = self.angles_for(attention)
        values, states = attention_states(
            rows, key_heads, heads, size, attention.norm, attention.norm_eps, cos, sin, attention.rotate_first
        )
        if states.is_cuda and cos is None and attention.norm is None:
            # A view of a GEMM's rows, whose stride may be any number; attention kernels load 16 bytes at a time.
            states = states.contiguous()
        attended = rows[:, 2 * key_heads * size :]
        attended[:, : heads * size] = self._attend(
            attention, states[:, key_heads:], states[:, :key_heads], values
        )
        return attended

    def _seen(self, window: int | None) -> tuple:
        """What a single new token attends to: keys and values of every layer, and the mask."""
        if window not in self._views:
            first = 0 if window is None else max(0, self.stop - window)
            seen, cache = slice(first, self.stop), self.cache
            mask = cache.valid[:, None, None, seen] if self.padded else None
            self._views[window] = (*cache.of_layers(seen), mask)
        return self._views[window]

    def _attend(self, attention: PackedAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write keys and values, return [batch * tokens, heads * head_dim]."""
        layer = attention.layer
        if self.tokens == 1:
            self._new[0][layer].copy_(keys)
            self._new[1][layer].copy_(values)
            seen_keys, seen_values, mask = self._seen(attention.window)
            if attention.sinks is not None:
                queries, keys, values = queries[:, :, None], seen_keys[layer], seen_values[layer]
                return prompt_attention(queries, keys, values, mask, attention.sinks)[:, :, 0].flatten(1)
            if attention.softcap is not None:
                queries = queries[:, :, None]
                return capped_attention(
                    queries, seen_keys[layer], seen_values[layer], mask, attention.softcap
                )[:, :, 0].flatten(1)
            return one_query_attention(queries, seen_keys[layer], seen_values[layer], mask)
        cached_keys, cached_values = self.cache.of_layer(layer)
        queries, keys, values = (
            states.unflatten(0, (-1, self.tokens)).transpose(1, 2) for states in (queries, keys, values)
        )
        cached_keys[:, :, self.start : self.stop] = keys
        cached_values[:, :, self.start : self.stop] = values
        first = self._first_seen(attention.window)
        if attention.window not in self._masks:
            self._masks[attention.window] = self._mask(attention.window, first, attention.is_written_out)
        mask = self._masks[attention.window]
        seen = slice(first, self.stop)
        cached = cached_keys[:, :, seen], cached_values[:, :, seen]
        if attention.softcap is None:
            attended = prompt_attention(queries, *cached, mask, attention.sinks)
        else:
            attended = capped_attention(queries, *cached, mask, attention.softcap)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _first_seen(self, window: int | None) -> int:
        """The first slot that any new token attends to: a sliding window bounds the work for a chunk of a prompt."""
        return 0 if window is None else max(0, self.start - window + 1)

    def _mask(self, window: int | None, first: int, explicit: bool) -> Tensor | None:
        """The mask of the new tokens over the slots from `first` on; see `prompt_attention`.

        explicit: as booleans in any case.
        """
        if not explicit and not self.padded and (window is None or window >= self.stop):
            return causal_mask(self.tokens, self.stop, self.cache.keys)
        device = self.cache.keys.device
        query = torch.arange(self.start, self.stop, device=device)[:, None]
        key = torch.arange(first, self.stop, device=device)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        if self.padded:
            # Padding attends to itself, because the softmax of a fully masked row is NaN.
            seen = (seen & self.cache.valid[:, None, first : self.stop]) | (key == query)
            return seen[:, None]
        return seen[None, None]


class StaticStep(CacheStep):
    """A pass of one token a row whose cache slot is in device memory, so that a CUDA graph can capture it.

    Args:
        slot: int64 [1], the slot that the token is written to.
    """

    def __init__(self, cache: KVCache, angles: list[tuple[Tensor, Tensor]], slot: Tensor):
        # Made contiguous once, not in every layer.
        super().__init__(cache, 1, [tuple(angle.contiguous() for angle in pair) for pair in angles])
        self.slot = slot

    def attend(self, attention: PackedAttention, rows: Tensor) -> Tensor:
        cos, sin = self.angles_for(attention)
        if attention.is_written_out:
            return self._attend_written_out(attention, rows, cos, sin)
        decode_attention_(
            rows, *self.cache.of_layer(attention.layer), self.cache.valid, self.slot, cos, sin, attention.norm,
            attention.heads, attention.window, attention.norm_eps, attention.rotate_first,
        )  # fmt: skip
        return rows[:, 2 * attention.key_heads * attention.head_dim :]

    def _attend_written_out(
        self, attention: PackedAttention, rows: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        """The same with capped scores or sinks, in PyTorch's operators over the whole cache."""
        heads, key_heads, size = attention.heads, attention.key_heads, attention.head_dim
        values, states = attention_states(
            rows, key_heads, heads, size, attention.norm, attention.norm_eps, cos, sin, attention.rotate_first
        )
        keys, queries = states[:, :key_heads, None], states[:, key_heads:, None]
        cached = self.cache.of_layer(attention.layer)
        for tensor, new in zip(cached, (keys, values[:, :, None]), strict=True):
            tensor.index_copy_(2, self.slot, new)
        places = torch.arange(self.cache.capacity, device=rows.device)
        seen = self.cache.valid & (places <= self.slot) | (places == self.slot)
        if attention.window is not None:
            seen = seen & (places > self.slot - attention.window)
        attended = rows[:, 2 * key_heads * size :]
        mask = seen[:, None, None]
        if attention.sinks is not None:
            new = prompt_attention(queries, *cached, mask, attention.sinks)
        else:
            new = capped_attention(queries, *cached, mask, attention.softcap)
        attended[:, : heads * size] = new[:, :, 0].flatten(1)
        return attended
