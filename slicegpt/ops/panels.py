"""Weights of 8 or 4 bits as the CPU's kernels read them: `PanelWeight`, which stands where a weight's tensor would.

16 rows make a panel. A block of it is 32 columns of all 16 rows, so that one vector holds neighbouring columns of every
row, a lane each, nothing has to be summed across lanes, and a thread reads a panel from its first byte to its last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 16, 32  # of a block; csrc/cpu/quantized.h's kPanelRows and kBlockItems


@dataclass(frozen=True)
class PanelWeight:
    """A weight [rows, columns] of `(code - zero) * scale`, and a part of it that is not quantized.

    Attributes:
        codes: uint8 [panels, blocks, 512 for 8 bits or 256 for 4]; rows and columns that are missing are zeros.
        scales: [panels, groups, 16] float16, bfloat16 or float32: of equally many neighbouring columns each, a multiple
            of 32 unless it is all.
        zeros: uint8 [panels, groups, 16], 0 to 15, with 4 bits; None: 8 with 4 bits, where codes are 0 to 15, and 0
            with 8 bits, where they are signed.
        rows, columns: of the quantized part.
        gated: the first half of the rows are gates, and the second begins with a panel of its own.
        rest: more rows [r, columns] below (`norm_linear`'s z columns) or, with `rest_axis` 1, more columns [rows, r]
            beside (what `rotate_add` multiplies z with); or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    columns: int
    gated: bool = False
    rest: Tensor | None = None
    rest_axis: int = 0

    @staticmethod
    def pack(
        codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, gated: bool = False
    ) -> PanelWeight:
        """Lay out a weight `(codes - zeros) * scales`.

        Args:
            codes: int8 [rows, columns], signed, `bits` of them.
            scales: [rows, groups]; the columns of a group are neighbours.
            zeros: int8 [rows, groups], signed, or None.
            bits: 8 or 4.

        Raises:
            ValueError: other bits, zero points with 8 of them, or groups that are no multiples of 32 columns.
        """
        rows, columns = codes.shape
        groups = scales.shape[1]
        if bits not in (4, 8) or (bits == 8 and zeros is not None):
            raise ValueError(f"bits must be 4, or 8 without zero points, got {bits}")
        if groups > 1 and columns % (COLUMNS * groups):
            raise ValueError(
                f"groups must be of multiples of {COLUMNS} columns, got {columns} in {groups} groups"
            )
        parts = [slice(0, rows)] if not gated else [slice(0, rows // 2), slice(rows // 2, rows)]
        lay = _lay_bytes if bits == 8 else _lay_nibbles
        shifted = None if zeros is None else (zeros + 8).to(torch.uint8)
        return PanelWeight(
            torch.cat([lay(codes[part]) for part in parts]),
            torch.cat([_lay_groups(scales[part]) for part in parts]),
            None if shifted is None else torch.cat([_lay_groups(shifted[part]) for part in parts]),
            rows,
            columns,
            gated,
        )

    def with_rest(self, rest: Tensor | None, axis: int) -> PanelWeight:
        """The same with a part that is not quantized: rows below (axis 0) or columns beside (axis 1)."""
        return replace(self, rest=None if rest is None else rest.contiguous(), rest_axis=axis)

    # --- what a tensor would say --------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole weight, `rest` included."""
        more = 0 if self.rest is None else self.rest.shape[self.rest_axis]
        return (self.rows + more, self.columns) if self.rest_axis == 0 else (self.rows, self.columns + more)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def data_ptr(self) -> int:
        return self.codes.data_ptr()

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        found = (self.codes, self.scales, self.zeros, self.rest)
        return [tensor for tensor in found if tensor is not None]

    # --- the numbers --------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        return self.codes.shape[2] * 8 // (ROWS * COLUMNS)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.scales.shape[1]

    @property
    def group_blocks(self) -> int:
        """Blocks of 32 columns that share a scale."""
        return self.codes.shape[1] // self.groups

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight as a tensor [rows, columns], each number rounded once to `dtype`."""
        panels, blocks, _ = self.codes.shape
        width = torch.float64 if dtype == torch.float64 else torch.float32
        if self.bits == 8:
            values = self.codes.view(torch.int8).view(panels, blocks, COLUMNS // 2, ROWS, 2)
            values = values.permute(0, 3, 1, 2, 4).to(width)
        else:
            words = self.codes.view(torch.int16).view(panels, blocks, COLUMNS // 8, ROWS, 2)
            nibbles = torch.stack([words >> 4 * pair & 15 for pair in range(4)], dim=4)
            values = nibbles.permute(0, 3, 1, 2, 4, 5).to(width)
            values -= 8 if self.zeros is None else self._of_blocks(self.zeros, width)[..., None, None]
        values = values.reshape(panels, ROWS, blocks, COLUMNS) * self._of_blocks(self.scales, width)
        values = values.to(dtype).view(panels * ROWS, blocks * COLUMNS)[:, : self.columns]
        if self.gated:
            values = torch.cat([half[: self.rows // 2] for half in values.chunk(2)])
        values = values[: self.rows]
        return values if self.rest is None else torch.cat((values, self.rest.to(dtype)), dim=self.rest_axis)

    def double(self) -> Tensor:
        return self.dense(torch.float64)

    def take(self, ids: Tensor) -> Tensor:
        """Rows [n, columns] of a table of 8 bits and a scale a row, `ids` [n], in the dtype of the scales."""
        panels, blocks, _ = self.codes.shape
        table = self.codes.view(torch.int8).view(panels, blocks, COLUMNS // 2, ROWS, 2)
        panel, row = ids // ROWS, ids % ROWS
        codes = table[panel, :, :, row].reshape(len(ids), -1)[:, : self.columns]
        return codes.to(self.dtype) * self.scales[panel, 0, row, None]

    def _of_blocks(self, groups: Tensor, dtype: torch.dtype) -> Tensor:
        """[panels, groups, 16] -> [panels, 16, blocks, 1]."""
        return groups.to(dtype).mT.repeat_interleave(self.group_blocks, dim=2)[..., None]


def _padded(codes: Tensor) -> Tensor:
    """[panels, 16, blocks, 32]."""
    rows, columns = codes.shape
    codes = F.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS))
    return codes.view(-1, ROWS, codes.shape[1] // COLUMNS, COLUMNS)


def _lay_bytes(codes: Tensor) -> Tensor:
    """[panel][block][pair of columns][row][column of the pair]."""
    pairs = _padded(codes).unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4)
    return pairs.contiguous().view(torch.uint8).flatten(2)


def _lay_nibbles(codes: Tensor) -> Tensor:
    """[panel][block][eight columns][row][column of a pair], words of four pairs' codes, the first lowest."""
    eights = _padded(codes + 8).unflatten(3, (-1, 4, 2)).permute(0, 2, 3, 1, 5, 4).to(torch.int16)
    words = eights[..., 0] | eights[..., 1] << 4 | eights[..., 2] << 8 | eights[..., 3] << 12
    return words.contiguous().view(torch.uint8).flatten(2)


def _lay_groups(groups: Tensor) -> Tensor:
    """[rows, groups] -> [panels, groups, 16]."""
    return F.pad(groups, (0, 0, 0, -groups.shape[0] % ROWS)).view(-1, ROWS, groups.shape[1]).mT.contiguous()
