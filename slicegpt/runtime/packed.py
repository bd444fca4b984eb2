"""What `slicegpt.runtime.packing` makes of a model: blocks of two GEMMs, and the rest of its weights."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt.modeling import SlicedConfig
from slicegpt.ops.panels import PanelWeight
from slicegpt.ops.rotate_add import reads_factor
from slicegpt.runtime.experts import PackedMixture


@dataclass(frozen=True)
class PackedAttention:
    """Attention of one layer, apart from its projections: heads, q/k norm and window.

    Attributes:
        layer: index into the cache.
        norm: scales [key heads + query heads, head_dim] of the norm of keys and queries, or None.
        window: number of tokens that a token attends to, itself included, or None.
        rotary: which of the network's tables turns queries and keys; None: no rotary positions.
        rotate_first: the norm comes behind the rotation.
        whole_norms: scales [key heads * head_dim] and [heads * head_dim] of norms over all heads of keys and of
            queries, which come first of all; or None.
        softcap: the cap of the scores, or None.
        sinks: [heads], of each head a score that belongs to no token, or None.
    """

    layer: int
    heads: int
    key_heads: int
    head_dim: int
    norm: Tensor | None
    norm_eps: float
    window: int | None
    rotary: int | None
    rotate_first: bool
    whole_norms: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_written_out(self) -> bool:
        """Whether its scores are others than those of PyTorch's operator."""
        return self.softcap is not None or self.sinks is not None


@dataclass(frozen=True)
class Projection:
    """One `norm_linear`: weight [N, d], bias [n_scaled] or None; `attention` follows it, or None."""

    weight: Tensor | PanelWeight
    bias: Tensor | None
    n_scaled: int
    activation: str
    attention: PackedAttention | None = None


@dataclass(frozen=True)
class PackedBlock:
    """One block, from its boundary to the next: input GEMMs, and one `rotate_add` of their concatenated results.

    A block of deleted parts has a compact shortcut's input alone, or none: see `carried`.

    Attributes:
        eps: of the norm before it; None: it reads the stream itself.
        output: [d', K]; K is 0 where there are no inputs.
        output_norm: [D], the scale of the norm that what it writes passes, or None; inner_eps: its epsilon.
        factor: Fᵀ [rank, d] of a compact shortcut, a view of the last rows of the last input's weight; `output` holds
            the same numbers in its last columns. None for another shortcut, for rank 0, and beside a `PanelWeight`.
        joint: [d', K + d], `output` and a dense `shortcut` side by side; they are views of it then. None: they are not.
        mixture: experts that write as well; `inputs` are then those of the shared one and of the shortcut, if any.
    """

    inputs: tuple[Projection, ...]
    width: int
    eps: float | None
    output: Tensor | PanelWeight
    output_bias: Tensor | None
    shortcut: Tensor | None
    factor: Tensor | None = None
    joint: Tensor | None = None
    mixture: PackedMixture | None = None
    output_norm: Tensor | None = None
    inner_eps: float = 0.0

    def with_joint(self, joint: Tensor) -> "PackedBlock":
        """The block with this matrix `[output | shortcut]`."""
        inner = self.output.shape[1]
        return replace(self, joint=joint, output=joint[:, :inner], shortcut=joint[:, inner:])

    @property
    def is_fused(self) -> bool:
        """Whether `norm_linear`, one attention operator and `rotate_add` are all there is to it."""
        plain = self.eps is not None and self.output_norm is None and self.mixture is None
        found = [one.attention for one in self.inputs if one.attention is not None]
        return plain and all(one.whole_norms is None and not one.is_written_out for one in found)

    @property
    def is_constant(self) -> bool:
        """It adds a constant to the stream, or nothing at all."""
        nothing = not self.inputs and self.mixture is None
        return nothing and self.shortcut is None and self.width == len(self.output)

    def carried(self, stream: Tensor) -> Tensor:
        """The stream [rows, d] past a block without inputs, [rows, d']: its shortcut and its constant."""
        if self.shortcut is not None:
            return F.linear(stream, self.shortcut, self.output_bias)
        stream = F.pad(stream, (0, len(self.output) - stream.shape[1]))
        return stream if self.output_bias is None else stream + self.output_bias


@dataclass(frozen=True)
class PackedNetwork:
    """All weights of a model.

    Attributes:
        embed_projection, positions: None where the model has none; positions [rows, d] begin at row
            `config.position_offset`.
        embed_bias: [d], what deleted parts before all others add to the stream, or None.
        rotary: tables `[cos | signed sin]` of every position, [positions, 2, rotary_dim] in the model's dtype, one for
            each of `config.rope_settings`; none without rotary positions.
        final_scale: [d], the scale that the last norm of a tied model keeps, or None.
        head_projection: from a sliced last boundary to the width of a tied head, or None.
        head: reads the last norm, or the output of `head_projection` without a norm (`n_scaled` is then 0).
        made_dense: the model has weights of fewer bits, for which there are no kernels here.
    """

    config: SlicedConfig
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor | PanelWeight
    embed_projection: Tensor | None
    positions: Tensor | None
    embed_bias: Tensor | None
    rotary: tuple[Tensor, ...]
    blocks: tuple[PackedBlock, ...]
    final_scale: Tensor | None
    final_eps: float
    head_projection: Projection | None
    head: Projection
    made_dense: bool = False

    def stored_bytes(self) -> int:
        """Bytes of all weights, with both copies of compact factors; a tied head is counted once."""
        tied = self.head.weight.data_ptr() == self.embedding.data_ptr()
        return _bytes([*self._weights(), None if tied else self.embedding, self.positions])

    def bytes_per_token(self, rows: int = 1) -> int:
        """Bytes of weights that generating a token for each of `rows` sequences moves from memory.

        One row of the embedding is counted, and both copies of a compact factor, or one where `rotate_add` reads the
        other from L2.
        """
        found = [
            block.output[:, -len(block.factor) :]
            for block in self.blocks
            if block.factor is not None and reads_factor(block.output, block.factor, rows)
        ]
        looked_up = _bytes([self.embedding]) // len(self.embedding)
        idle = sum(block.mixture.idle_bytes(rows) for block in self.blocks if block.mixture is not None)
        return _bytes([*self._weights(), self.positions_of_a_token()]) + looked_up - _bytes(found) - idle

    def positions_of_a_token(self) -> Tensor | None:
        """One row of the learned positions."""
        return None if self.positions is None else self.positions[:1]

    def weights_text(self) -> str:
        """The dtype, and what the weights of the blocks are where they are not of it: bfloat16, 4-bit weights."""
        name = str(self.dtype).removeprefix("torch.")
        if self.made_dense:
            return f"{name}, quantized weights made dense (no kernels for them here)"
        bits = self.bits()
        return f"{name}, {' and '.join(map(str, bits))}-bit weights" if bits else name

    def bits(self) -> list[int]:
        """Of the quantized weights of the blocks, most first; none where there are none."""
        weights = [one.weight for block in self.blocks for one in block.inputs] + [
            b.output for b in self.blocks
        ]
        return sorted({one.bits for one in weights if isinstance(one, PanelWeight)}, reverse=True)

    def _weights(self) -> list[Tensor | PanelWeight | None]:
        """All weights but the embedding tables."""
        tensors = [self.embed_projection, self.embed_bias, self.final_scale, self.head.weight, self.head.bias]
        if self.head_projection is not None:
            tensors += [self.head_projection.weight, self.head_projection.bias]
        for block in self.blocks:
            tensors += [block.output, block.output_bias, block.shortcut, block.output_norm]
            if block.mixture is not None:
                tensors += block.mixture.weights()
            for projection in block.inputs:
                tensors += [projection.weight, projection.bias]
                if (attention := projection.attention) is not None:
                    tensors += [attention.norm, attention.sinks, *(attention.whole_norms or ())]
        return tensors


def _bytes(tensors: list[Tensor | PanelWeight | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
