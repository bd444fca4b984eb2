"""Second moments of the calibration tokens: all that the output refit needs to know of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from slicegpt.hardware.devices import has_fast_bfloat16
from slicegpt.hardware.ranks import Ranks
from slicegpt.hardware.scratch import PIECE_BYTES, copy_into, release, spilled
from slicegpt.ops import cross_gram_, gram_
from slicegpt.slicing.matrices import panels

# Every call of `gram_` goes through a whole [K, K] in float64, which on a CPU costs as much as the products of some
# hundred tokens: calibration batches of one sample are joined to this many tokens.
TOKENS_PER_CALL = 4096


class Moments:
    """Second moments of activations [n, K] and of what their block has to write [n, D], all in float64.

    Attributes:
        gram: [K, K]; cross: [K, D]; energy: the sum of squares of what is to be written. Once all tokens are added,
            `rows` and `diagonal` read them wherever `spill` has brought them.
        inputs, outputs: sums [K] and [D], for an intercept; tokens: their number, or the sum of their weights.
        groups: columns of each kind of activations, K in all; their scales differ. size: K.
        spilled: whether `gram` and `cross` are out of the device's memory.
        device: where the tokens are added, and where `rows` brings what it reads.
    """

    def __init__(self, groups: Sequence[int], outputs: int, device: torch.device):
        self.groups, inputs = tuple(groups), sum(groups)
        self.size, self.device = inputs, device

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross, self.energy = self._sums(inputs, inputs), self._sums(inputs, outputs), zeros()
        self.inputs, self.outputs, self.tokens = zeros(inputs), zeros(outputs), zeros()
        self.spilled = False
        self._diagonal: torch.Tensor | None = None  # of a spilled Gram matrix, whose pages it lies all over

    def _sums(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(
        self, activations: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
    ) -> None:
        """Add tokens: `activations` [n, K] and `target` [n, D] of one dtype, `weight` [n] or None for ones."""
        # "fast" errs by some 1e-6 of the mean diagonal, a thousandth of the smallest ridge; so do float32 sums of one
        # batch.
        exact = activations.dtype == torch.float64
        precision, dtype = ("fp64", torch.float64) if exact else ("fast", torch.float32)
        if weight is None:
            weight = torch.ones(len(target), dtype=dtype, device=target.device)
        if not self.size:
            pass  # a block of deleted parts: a constant is all that it writes
        elif activations.dtype == torch.float32 and has_fast_bfloat16(activations.device):
            # As the dense blocks in `Objective.teacher_dtype`: roundings of single numbers, by 2^-9 of them at most,
            # average out over all tokens.
            root = weight.to(dtype).sqrt()[:, None]
            inputs, outputs = ((states * root).bfloat16() for states in (activations, target))
            self._add_products(inputs, outputs, None, precision)
        else:
            self._add_products(activations, target, weight, precision)
        self.energy += (
            weight.double() @ torch.linalg.vector_norm(target, dim=1, dtype=dtype).double().square()
        )
        self.inputs += weight.to(dtype) @ activations.to(dtype)
        self.outputs += weight.to(dtype) @ target.to(dtype)
        self.tokens += weight.sum(dtype=torch.float64)

    def _add_products(
        self, inputs: torch.Tensor, outputs: torch.Tensor, weight: torch.Tensor | None, precision: str
    ) -> None:
        gram_(self.gram, inputs, weight, precision)
        cross_gram_(self.cross, inputs, outputs, weight, precision)

    def reduce_(self, ranks: Ranks) -> None:
        """Add up what the ranks have added, on rank 0; on the others the sums are of no use any more."""
        if self.size:
            ranks.reduce_symmetric_(self.gram)
            ranks.reduce_(self.cross)
            ranks.reduce_(self.inputs)
        for sums in (self.outputs, self.energy, self.tokens):
            ranks.reduce_(sums)

    def is_finite(self) -> bool:
        parts = (
            all(bool(part.isfinite().all()) for part in self.rows(rows))
            for rows in panels(self.size, self.size)
        )
        return bool(self.energy.isfinite()) and all(parts)

    def diagonal(self) -> torch.Tensor:
        """Of the Gram matrix, [K]."""
        return self._diagonal if self.spilled else self.gram.diagonal()

    def rows(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `gram` [n, K] and of `cross` [n, D], on the device; not to be written to."""
        return self._read(self.gram, rows), self.cross_rows(rows)

    def cross_rows(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return self._read(self.cross, rows)

    def _read(self, matrix: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        if not self.spilled:
            return matrix[rows]
        if isinstance(rows, slice):
            read = torch.empty(matrix[rows].shape, dtype=matrix.dtype, device=self.device)
            copy_into(read, matrix[rows])
            return read
        read = torch.empty(len(rows), matrix.shape[1], dtype=matrix.dtype, device=self.device)
        step = max(1, PIECE_BYTES // matrix[0].nbytes)
        for into, own in zip(read.split(step), rows.cpu().split(step), strict=True):
            into.copy_(matrix[own])
            release(matrix)
        return read

    def spill(self, folder: str | os.PathLike | None = None) -> None:
        """Take `gram` and `cross` out of the device's memory: from a GPU to the host, from a CPU to a file in `folder`.

        Nothing can be added any more.
        """
        if not self.spilled:
            self._diagonal = self.gram.diagonal().clone()
            self.gram = spilled(self.gram, folder)
            self.cross = spilled(self.cross, folder)
            self.spilled = True


class JoinedBatches:
    """Adds tokens to `moments`, at least `tokens_per_call` at once; `finish` adds the rest."""

    def __init__(self, moments: Moments, tokens_per_call: int = TOKENS_PER_CALL):
        self.moments, self.tokens_per_call = moments, tokens_per_call
        self.waiting: list[tuple[torch.Tensor, ...]] = []

    def add(self, activations: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> None:
        """As `Moments.add`; the tensors must not change until they have been added."""
        self.waiting.append((activations, target, weight))
        if sum(len(batch[0]) for batch in self.waiting) >= self.tokens_per_call:
            self.finish()

    def finish(self) -> Moments:
        """Add what is waiting, and return the moments of all."""
        if len(self.waiting) == 1:
            self.moments.add(*self.waiting[0])
        elif self.waiting:
            self.moments.add(*map(torch.cat, zip(*self.waiting, strict=True)))
        self.waiting.clear()
        return self.moments
