"""What a run of slicing does besides where weights are stored in 8 or 4 bits: it rounds them, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from slicegpt.conversion.folding import TABLE_ROWS, rotated_rows
from slicegpt.conversion.rounding import QuantizedMatrix
from slicegpt.families import Checkpoint, Linear
from slicegpt.hardware.ranks import Ranks
from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.blocks import Block, LiftedBlock
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.propagation import Propagation
from slicegpt.slicing.quantizing import QuantizedWriters, Quantizer, round_table
from slicegpt.slicing.refit import BlockFits
from slicegpt.slicing.sink import Sink
from slicegpt.slicing.timing import StageTimer


class Rounds:
    """The part of `slicegpt.slicing.slicer.Slicer` that quantises."""

    checkpoint: Checkpoint
    config: SlicedConfig
    mean_subtraction: bool
    options: SlicingOptions
    propagation: Propagation
    quantizer: Quantizer | None
    ranks: Ranks
    ridges: Sequence[float]
    sink: Sink
    stage: StageTimer
    agreed: Callable[[Callable[[], Any]], Any]

    def quantize_table(self, basis: torch.Tensor) -> None:
        """Store the embedding in 8 bits; the calibration tokens begin with it as it is stored."""
        table, whole, dtype = self.checkpoint.embedding, self.config.embed_projection, self.options.dtype

        def rounded() -> QuantizedMatrix:
            pieces = table.split(TABLE_ROWS)
            if not whole:
                wide = torch.promote_types(dtype, torch.float32)
                pieces = rotated_rows(table, basis, self.mean_subtraction, wide)
            return round_table(pieces, dtype)

        with self.stage("quantise"):
            matrix = self.agreed(rounded)
            if self.ranks.first:
                self.sink.store(matrix.entries("model.embed_tokens"))

        def lookup(ids: torch.Tensor) -> torch.Tensor:
            rows = matrix.rows(ids.flatten().to(matrix.codes.device)).dequantise().to(basis.device)
            rows = rows if whole else rows.double() @ basis.mT
            return rows.view(*ids.shape, -1)

        with self.stage("signals"):
            self.propagation.start_again(self.checkpoint, lookup)

    def quantize_readers(
        self, block: Block, readers: dict[str, dict[str, torch.Tensor]], lifted: LiftedBlock
    ) -> dict[str, dict[str, QuantizedMatrix]]:
        """Round a block's input weights: those in `readers` and in `lifted` become the rounded ones.

        Returns:
            Of each part, its matrices by name.
        """
        moments, dtype = self.propagation.read(block, lifted), self.options.dtype
        with self.stage("quantise"):
            packed = self.agreed(lambda: self.quantizer.readers(block, readers, moments.matrix))
        for part, state in readers.items():
            stored = {f"{name}.weight": own.dequantise() for name, own in packed[part].items()}
            readers[part] = {name: tensor.to(dtype) for name, tensor in state.items()} | stored
        lifted.set_readers(readers)
        return packed

    def quantize_writers(
        self,
        block: Block,
        lifted: LiftedBlock,
        fits: BlockFits,
        writers: Mapping[str, Linear],
        moments: Moments | None,
        basis: torch.Tensor,
    ) -> dict[float, QuantizedWriters]:
        """Round a block's output weights at every λ; `lifted` writes with those at the first. On rank 0 they return."""
        rounded = {}
        with self.stage("quantise"):
            if self.ranks.first:
                for ridge in self.ridges:
                    rounded[ridge] = self.quantizer.writers(block, fits, ridge, writers, moments, basis)
            first = self.agreed(lambda: rounded[self.ridges[0]].lifted(basis, writers))
            lifted.set_writers(first)
        return rounded
