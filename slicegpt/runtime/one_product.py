"""A block with a dense shortcut as one GEMM of the library: `h' = [a | h] [W | S]ᵀ`, where nothing is copied together.

The input GEMMs of a block write side by side into one matrix, in whose last columns the block before has written h:
`[v | k | attended | h]`, `[neurons | h]`, `[v | k | attended | neurons | h]`. Its last columns are the GEMM's rows, and
`PackedBlock.joint` is its weight. The stream's sums of squares are left to the next norm, which reads the stream.
"""

from dataclasses import dataclass

from torch import Tensor

from slicegpt.ops import torch_gemm
from slicegpt.ops.contracts import norm_linear_columns
from slicegpt.ops.many_rows import PIECE_ITEMS
from slicegpt.ops.panels import PanelWeight
from slicegpt.runtime.packed import PackedBlock


def can_be_joined(block: PackedBlock) -> bool:
    """Whether `[output | shortcut]` can be one matrix, and `[a | h]` another, whose parts begin at whole pieces."""
    if (
        block.shortcut is None
        or not block.inputs
        or block.mixture is not None
        or block.output_norm is not None
    ):
        return False
    weights = [block.output, *(one.weight for one in block.inputs)]
    columns = [*_columns(block), block.output.shape[1], *block.shortcut.shape]
    return (
        not any(isinstance(weight, PanelWeight) for weight in weights)
        and all(one.attention is None for one in block.inputs[1:])
        and all(number % PIECE_ITEMS == 0 for number in columns)
    )


@dataclass(frozen=True)
class JoinedRows:
    """A block's activations and the stream before it.

    Attributes:
        results: where the input GEMMs write, each [rows, columns].
        stream: [rows, d], h.
        rows: [rows, K + d], `[a | h]` once attention has written over q.
    """

    results: tuple[Tensor, ...]
    stream: Tensor
    rows: Tensor

    @classmethod
    def of(cls, block: PackedBlock, like: Tensor) -> "JoinedRows":
        """Uninitialised, with as many rows as `like` has, of its dtype and device."""
        columns, width = _columns(block), block.shortcut.shape[1]
        whole = like.new_empty((len(like), sum(columns) + width))
        *results, stream = whole.split([*columns, width], dim=1)
        return cls(tuple(results), stream, whole[:, -(block.output.shape[1] + width) :])

    def multiply(self, block: PackedBlock, out: Tensor) -> None:
        """The stream behind the block, into `out` [rows, d']."""
        torch_gemm.one_product(out, self.rows, block.joint, block.output_bias)


def _columns(block: PackedBlock) -> list[int]:
    return [norm_linear_columns(one.weight, one.n_scaled, one.activation) for one in block.inputs]
