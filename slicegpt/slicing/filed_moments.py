"""Second moments that are added up in files, for a CPU whose memory does not hold them beside the blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from slicegpt.hardware.memory import free_memory, tells
from slicegpt.hardware.scratch import copy_into, release, scratch_tensor
from slicegpt.ops import cross_gram_
from slicegpt.slicing.matrices import panels
from slicegpt.slicing.moments import TOKENS_PER_CALL, Moments


class FiledMoments(Moments):
    """`Moments` whose `gram` and `cross` are files from the beginning; in memory is a panel of rows at a time.

    Of the Gram matrix the upper triangle is added up, panel by panel, and copied onto the lower one when it is first
    read: a call of `add` reads and writes half of it. Every sum is that of `Moments`, over the same tokens in the same
    pieces; only within a piece may a matrix product of other shape add in another order.

    Args:
        folder: of the files; None: that of temporary files.
    """

    def __init__(
        self,
        groups: Sequence[int],
        outputs: int,
        device: torch.device,
        folder: str | os.PathLike | None = None,
    ):
        self.folder = folder
        super().__init__(groups, outputs, device)
        self.spilled, self.mirrored = True, False

    def _sums(self, *shape: int) -> torch.Tensor:
        return scratch_tensor(shape, torch.float64, self.folder)

    def _add_products(
        self, inputs: torch.Tensor, outputs: torch.Tensor, weight: torch.Tensor | None, precision: str
    ) -> None:
        self.mirrored = False
        for rows in panels(*self.gram.shape):
            right = slice(rows.start, self.size)
            _add(self.gram[rows], right, inputs[:, rows], inputs[:, right], weight, precision)
        for rows in panels(*self.cross.shape):
            _add(self.cross[rows], slice(None), inputs[:, rows], outputs, weight, precision)

    def _mirror(self) -> None:
        """Copy the upper triangle onto the lower one, and keep the diagonal, whose pages are all of the file's."""
        if self.mirrored:
            return
        blocks, diagonal = list(panels(*self.gram.shape)), []
        for number, rows in enumerate(blocks):
            square = self.gram[rows, rows]
            square.copy_(square.triu() + square.triu(1).mT)
            diagonal.append(square.diagonal().clone())
            for below in blocks[number + 1 :]:
                self.gram[below, rows] = self.gram[rows, below].mT
                release(self.gram[below])
            release(self.gram[rows])
        self._diagonal, self.mirrored = torch.cat(diagonal), True

    def diagonal(self) -> torch.Tensor:
        self._mirror()
        return super().diagonal()

    def rows(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._mirror()
        return super().rows(rows)


def _add(
    sums: torch.Tensor,
    columns: slice,
    left: torch.Tensor,
    right: torch.Tensor,
    weight: torch.Tensor | None,
    precision: str,
) -> None:
    """Add `leftᵀ diag(weight) right` to `columns` of `sums`, whole rows of a file."""
    panel = torch.empty_like(sums[:, columns], memory_format=torch.contiguous_format)
    copy_into(panel, sums[:, columns])
    release(sums)
    cross_gram_(panel, left, right, weight, precision)
    copy_into(sums[:, columns], panel)
    release(sums)


def moments_for(
    groups: Sequence[int],
    outputs: int,
    device: torch.device,
    beside: int,
    folder: str | os.PathLike | None = None,
) -> Moments:
    """Moments without tokens: on a CPU that tells that they do not fit into its free memory, in files of `folder`.

    Args:
        beside: bytes that are taken while tokens are added, see `batch_bytes`.
    """
    known = device.type == "cpu" and tells(device)
    if known and needs_files(sum(groups), outputs, beside, free_memory(device)):
        return FiledMoments(groups, outputs, device, folder)
    return Moments(groups, outputs, device)


def needs_files(inputs: int, outputs: int, beside: int, free: float) -> bool:
    """Whether moments [inputs, inputs + outputs] do not fit into `free` bytes with `beside`."""
    return inputs > 0 and free < 8 * inputs * (inputs + outputs) + beside


def batch_bytes(
    tokens: int, fitted_tokens: int, rows: int, own: int, inputs: int, width: int, item: int
) -> int:
    """What passing a batch through a block and adding it to moments takes beside the streams, in bytes.

    Args:
        tokens: of a batch; fitted_tokens: of all that are added.
        rows: of the block's layers that read the stream; own: columns of those that write it; inputs: K.
        width: D, of the stream; item: bytes of its elements.
    """
    together = tokens if tokens >= TOKENS_PER_CALL else math.ceil(TOKENS_PER_CALL / tokens) * tokens
    together = min(together, max(fitted_tokens, tokens))
    passing = tokens * (rows + 2 * own + 6 * width) * item
    waiting = together * (inputs + width) * item * (2 if together > tokens else 1)
    # In float32 with the roots of their weights, in bfloat16, and packed into panels of 1024 tokens.
    adding = together * inputs * 4 + 2 * together * (inputs + width) + 2 * 4096 * inputs
    return max(passing, waiting + adding)
