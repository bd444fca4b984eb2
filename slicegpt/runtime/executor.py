"""The forward pass of a packed network: rows of tokens through `norm_linear`, attention and `rotate_add`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt import ops
from slicegpt.ops import many_rows, quantized, torch_gemm
from slicegpt.ops.contracts import NormLinearInputs, sumsq_dtype
from slicegpt.ops.dispatch import capability_of, requested_backend
from slicegpt.ops.norm_linear import DISPATCHER as NORM_LINEAR
from slicegpt.ops.norm_linear import norm_linear_into
from slicegpt.ops.panels import PanelWeight
from slicegpt.ops.rotate_add import DISPATCHER as ROTATE_ADD
from slicegpt.runtime.cache import CacheStep
from slicegpt.runtime.experts import PackedMixture, add_experts, shared_factor
from slicegpt.runtime.one_product import JoinedRows
from slicegpt.runtime.packed import PackedAttention, PackedBlock, PackedNetwork, Projection


def _norm_linear_on_cpu(*arguments) -> Tensor:
    inputs = NormLinearInputs(*arguments)
    if isinstance(inputs.weight, PanelWeight):
        name = quantized.NORM_LINEAR.choose("auto", None, inputs.h.dtype, inputs.weight.bits)
        return quantized.norm_linear_by(name, inputs)
    name = NORM_LINEAR.choose("auto", None, inputs.h.dtype, len(inputs.h))
    return torch_gemm.norm_linear(inputs) if name == "torch" else NORM_LINEAR.launcher(name)(inputs)


def _rotate_add_on_cpu(
    a: Tensor,
    weight: Tensor | PanelWeight,
    h: Tensor,
    shortcut: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`rotate_add`; where torch's GEMM runs, the sums of squares are None, and the next norm computes them.

    `factor` is for GPUs, and unused here.
    """
    if isinstance(weight, PanelWeight):
        name = quantized.ROTATE_ADD.choose("auto", None, a.dtype, weight.bits)
        return quantized.rotate_add_by(name, a, weight, h, shortcut, bias)
    name = ROTATE_ADD.choose("auto", None, a.dtype, len(a))
    if name == "torch":
        return torch_gemm.rotate(a, weight, h, shortcut, bias), None
    return ROTATE_ADD.launcher(name)(a, weight, h, shortcut, bias)


def row_scale(block: PackedBlock, stream: Tensor, sums: Tensor | None) -> tuple[Tensor | None, float]:
    """The sums of squares and the epsilon that `norm_linear` scales rows by: by exactly 1 where there is no norm."""
    if block.eps is not None:
        return sums, block.eps
    return stream.new_full((len(stream), 1), block.width, dtype=sumsq_dtype(stream.dtype)), 0.0


def with_whole_norms(attention: PackedAttention, rows: Tensor) -> Tensor:
    """Rows [tokens, v | k | q | ...] with keys and queries normalised over all of their heads, in place."""
    if attention.whole_norms is None:
        return rows
    begin = attention.key_heads * attention.head_dim
    for scale in attention.whole_norms:
        columns = rows[:, begin : begin + len(scale)]
        columns.copy_(F.rms_norm(columns, (len(scale),), scale, attention.norm_eps))
        begin += len(scale)
    return rows


def add_normed(
    block: PackedBlock, a: Tensor, stream: Tensor, rotate_add: Callable[..., tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, None]:
    """The stream behind a block that normalises what it writes; the next norm computes its own sums of squares."""
    if isinstance(block.output, PanelWeight):
        written, _ = rotate_add(a, block.output, torch.zeros_like(stream), None, block.output_bias, None)
    else:
        written = F.linear(a, block.output, block.output_bias)
    return stream + F.rms_norm(written, (written.shape[1],), block.output_norm, block.inner_eps), None


def look_up(table: Tensor | PanelWeight, ids: Tensor) -> Tensor:
    """Rows [n, columns] of an embedding table."""
    return table.take(ids) if isinstance(table, PanelWeight) else F.embedding(ids, table)


class Executor:
    """Runs a `PackedNetwork`. It holds no state of a generation, so that several may share it.

    Args:
        packed: the weights.
        through_operators: True calls the registered operators, which `torch.compile` can trace; False calls the CPU's
            kernels and GEMMs directly, which saves about 10 µs of dispatch and checks a call. None is False on a CPU,
            unless SLICEGPT_BACKEND names a backend, and True elsewhere.
    """

    def __init__(self, packed: PackedNetwork, through_operators: bool | None = None):
        self.packed = packed
        if through_operators is None:
            through_operators = packed.device.type != "cpu" or requested_backend() != "auto"
        self.through_operators = through_operators
        self.norm_linear = ops.norm_linear if through_operators else _norm_linear_on_cpu
        self.rotate_add = ops.rotate_add if through_operators else _rotate_add_on_cpu

    def angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosines and signed sines of these positions, each [positions, 1, rotary_dim], of every rotary table.

        Positions of padding may be negative.
        """
        rows = positions.flatten().clamp(min=0)
        return [table[rows][:, :, None].unbind(1) for table in self.packed.rotary]

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions [batch, tokens] to the stream [batch * tokens, d] at boundary 0."""
        packed = self.packed
        stream = look_up(packed.embedding, ids.flatten())
        if packed.embed_projection is not None:
            stream = F.linear(stream, packed.embed_projection)
        if packed.positions is not None:
            offset = packed.config.position_offset
            stream = stream + F.embedding(positions.flatten().clamp(min=-offset) + offset, packed.positions)
        return stream if packed.embed_bias is None else stream + packed.embed_bias

    def blocks(
        self, stream: Tensor, step: CacheStep, sums: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after all blocks, and its rows' sums of squares (None: not computed).

        sums: those of `stream`, where somebody has them.
        """
        joined = None
        capability, dtype = capability_of(stream), stream.dtype
        dense, added = (
            many_rows.in_one_product(capability, dtype, len(stream), one) for one in (True, False)
        )
        if added:
            stream = stream.clone()  # what it adds to, in place, is not the caller's
        blocks = self.packed.blocks
        for block, following in zip(blocks, (*blocks[1:], None), strict=False):
            if not dense or block.joint is None:
                stream, sums = self._block(block, stream, sums, step, added)
                continue
            if joined is None:
                joined = JoinedRows.of(block, stream)
                joined.stream.copy_(stream)
            self._fill(block, joined, sums, step)
            after = None
            if following is not None and following.joint is not None:
                after = JoinedRows.of(following, stream)
            stream = stream.new_empty(len(stream), len(block.joint)) if after is None else after.stream
            joined.multiply(block, stream)
            sums, joined = None, after
        return stream, sums

    def _fill(self, block: PackedBlock, joined: JoinedRows, sums: Tensor | None, step: CacheStep) -> None:
        """What the block computes, beside the stream that it reads."""
        sums, eps = row_scale(block, joined.stream, sums)
        for projection, out in zip(block.inputs, joined.results, strict=True):
            arguments = self._arguments(projection, joined.stream, sums, block.width, eps)
            if self.through_operators:
                norm_linear_into(out, *arguments)
            else:
                out.copy_(self.norm_linear(*arguments))
            if projection.attention is not None:
                step.attend(projection.attention, with_whole_norms(projection.attention, out))

    def _block(
        self, block: PackedBlock, stream: Tensor, sums: Tensor | None, step: CacheStep, in_place: bool
    ) -> tuple[Tensor, Tensor | None]:
        """in_place: a product may be added to the stream where it lies, by the library's GEMM."""
        if not block.inputs and block.mixture is None:
            return block.carried(stream), None
        pieces = []
        sums, eps = row_scale(block, stream, sums)
        for projection in block.inputs:
            rows, attention = self._project(projection, stream, sums, block.width, eps), projection.attention
            if attention is not None:
                rows = step.attend(attention, with_whole_norms(attention, rows))
            pieces.append(rows)
        if block.mixture is not None:
            return self._mixture(block, block.mixture, stream, pieces), None
        a = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        plain = block.shortcut is None and block.output_norm is None
        if in_place and plain and not isinstance(block.output, PanelWeight):
            wider = len(block.output) - stream.shape[1]
            base = F.pad(stream, (0, wider)) if wider else stream
            return torch_gemm.add_product_(base, a, block.output, block.output_bias), None
        return self._rotate(block, a, stream)

    def _mixture(
        self, block: PackedBlock, mixture: PackedMixture, stream: Tensor, pieces: list[Tensor]
    ) -> Tensor:
        """A block of experts; `pieces` are the results of its shared expert and of a compact shortcut, or nothing."""
        factor = shared_factor(mixture, stream)
        if factor is not None:
            pieces[0][:, : mixture.shared_neurons] *= factor
        base = self._rotate(block, pieces[0], stream)[0] if pieces else block.carried(stream)
        return add_experts(mixture, stream, base, self.norm_linear, self.rotate_add)

    def _project(
        self, projection: Projection, stream: Tensor, sums: Tensor | None, width: float, eps: float
    ) -> Tensor:
        return self.norm_linear(*self._arguments(projection, stream, sums, width, eps))

    @staticmethod
    def _arguments(
        projection: Projection, stream: Tensor, sums: Tensor | None, width: float, eps: float
    ) -> tuple:
        """Of `norm_linear`."""
        weight, bias, n_scaled = projection.weight, projection.bias, projection.n_scaled
        return stream, weight, bias, sums, n_scaled, projection.activation, width, eps

    def _rotate(self, block: PackedBlock, a: Tensor, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        if block.output_norm is not None:
            return add_normed(block, a, stream, self.rotate_add)
        return self.rotate_add(a, block.output, stream, block.shortcut, block.output_bias, block.factor)

    def logits(self, stream: Tensor, sums: Tensor | None) -> Tensor:
        """Logits [rows, vocab_size] of rows of the residual stream after the last block."""
        packed, width = self.packed, stream.shape[1]
        if packed.final_scale is not None:
            if sums is None:
                sums = stream.to(torch.promote_types(stream.dtype, torch.float32)).square()
            stream = stream * packed.final_scale
        if packed.head_projection is None:
            logits = self._project(packed.head, stream, sums, width, packed.final_eps)
            cap = packed.config.final_logit_softcapping
            return logits if cap is None else torch.tanh(logits / cap) * cap
        inner = self._project(packed.head_projection, stream, sums, width, packed.final_eps)
        weight = packed.head.weight
        if isinstance(weight, PanelWeight):  # all of its rows are scaled: here by 1
            ones = inner.new_ones((len(inner), 1), dtype=sumsq_dtype(inner.dtype))
            logits = self.norm_linear(inner, weight, None, ones, weight.rows, "none", 1.0, 0.0)
        else:
            logits = self.norm_linear(inner, weight, None, None, 0, "none", width, packed.final_eps)
        return logits if packed.head.bias is None else logits + packed.head.bias
