"""Quantisation, the last step of a block: its weights in 8 or 4 bits, by the second moments that slicing has of it.

What reads the stream is rounded by the moments of the normalised stream, before anything else of the block is done:
the output weights are then fitted to what the rounded ones give, and make up for them. What writes it is rounded on the
next basis, by the quadratic that the refit has minimised (`slicegpt.slicing.objective`): around its minimum the squared
error rises as `tr(δ H δᵀ)` with `H` the matrix of its normal equations, penalty and all. Then the calibration tokens
pass the block once more, as it is stored, so that the next ones see its errors. Embedding and head are rounded to
nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from slicegpt.conversion.folding import rotate_writer
from slicegpt.conversion.quantization import TABLE, WRITING, WeightFormat, part_schemes
from slicegpt.conversion.rounding import Grid, QuantizedMatrix, round_to_nearest
from slicegpt.errors import SliceGPTError
from slicegpt.families import Linear
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.quantized import WeightScheme
from slicegpt.slicing.blocks import Block
from slicegpt.slicing.gptq import Segment, gptq
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.refit import BlockFits
from slicegpt.slicing.regression import prior_of

# Of the mean diagonal of the normalised stream's moments, what is added to all of it: directions that the calibration
# text hardly shows count a little. Ten times as much was worse on the text itself (docs/quality.md).
DAMPING = 1e-3


def round_table(pieces: Iterable[torch.Tensor], dtype: torch.dtype) -> QuantizedMatrix:
    """A table that comes in pieces of rows, rounded to nearest in 8 bits by row."""
    rounded = [round_to_nearest(piece, TABLE, dtype) for piece in pieces]
    scale = torch.cat([piece.grid.scale for piece in rounded])
    return QuantizedMatrix(torch.cat([piece.codes for piece in rounded]), Grid(scale, None, TABLE.bits))


# The layer whose rows are the columns of a part's output projection.
WRITTEN_BY = {"attention": "q_proj.", "mlp": "up_proj."}


def kept_rows(config: SlicedConfig, part: str, name: str, fits: BlockFits) -> torch.Tensor | None:
    """Which rows a layer of a part keeps, int64; None: all.

    Args:
        name: of the layer and its tensor, such as "q_proj.weight".
    """
    if part == "mlp":
        return fits.neurons
    kept, size = fits.heads if name.startswith("q_proj.") else fits.groups, config.head_dim
    return None if kept is None else (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()


@dataclass(frozen=True)
class QuantizedWriters:
    """A block's output weights as they are stored, on the basis after it.

    Attributes:
        matrices: of each part, its output projection [d, its columns or the neurons that stay].
        shortcut: a dense one [d, its columns], float64, with the errors of the others made up for; None: no such.
        biases: of each of these [d], float64, or None.
        columns: of each part, which of its columns stay; None: all.
    """

    matrices: Mapping[str, QuantizedMatrix]
    shortcut: torch.Tensor | None
    biases: Mapping[str, torch.Tensor | None]
    columns: Mapping[str, torch.Tensor | None]

    def lifted(self, basis: torch.Tensor, writers: Mapping[str, Linear]) -> dict[str, Linear]:
        """The same at full width, with 0 for the columns that are deleted: what `LiftedBlock` computes with."""
        layers = {}
        for part, full in writers.items():
            own = self.shortcut if part == "shortcut" else self.matrices[part].dequantise().double()
            weight = basis @ own
            if (columns := self.columns.get(part)) is not None:
                weight, own = weight.new_zeros(len(basis), full.weight.shape[1]), weight
                weight[:, columns] = own
            bias = self.biases[part]
            layers[part] = Linear(weight, None if bias is None else basis @ bias)
        return layers


class Quantizer:
    """How a run of slicing stores its weights.

    Args:
        config: the sliced model's, in plain numbers.
        weights: what was asked for.
        objective: of the refit.
        dtype: of the model.
    """

    def __init__(self, config: SlicedConfig, weights: WeightFormat, objective: Objective, dtype: torch.dtype):
        if not all(config.neurons) or not all(config.key_value_heads):
            raise SliceGPTError(
                "every layer must keep some neurons and key/value heads, got one whose part is deleted whole",
                "quantize",
            )
        self.config, self.weights, self.objective, self.dtype = config, weights, objective, dtype

    def schemes(self, block: Block) -> dict[str, dict[str, WeightScheme]]:
        """Of each part of a block, how each of its layers is stored."""
        return {part: part_schemes(self.config, self.weights, block.layer, part) for part in block.parts}

    def readers(
        self, block: Block, states: Mapping[str, Mapping[str, torch.Tensor]], moments: torch.Tensor
    ) -> dict[str, dict[str, QuantizedMatrix]]:
        """Of each part, its layers that read the stream, by name; all of them at once, for they read the same.

        Args:
            states: of each part, the state of all but its output projection.
            moments: `Propagation.read`'s.
        """
        schemes = self.schemes(block)
        found = [(part, name) for part in states for name in schemes[part] if name not in WRITING.values()]
        weights = [states[part][f"{name}.weight"].double() for part, name in found]
        damped = moments.clone()
        damped.diagonal().add_(DAMPING * moments.diagonal().mean())
        part, name = found[0]
        segment = Segment(len(moments), schemes[part][name])
        (matrix,), _ = gptq(torch.cat(weights), damped, [segment], self.dtype)
        rounded: dict[str, dict[str, QuantizedMatrix]] = {part: {} for part in states}
        start = 0
        for (part, name), weight in zip(found, weights, strict=True):
            rounded[part][name] = matrix.rows(slice(start, start + len(weight)))
            start += len(weight)
        return rounded

    def writers(
        self,
        block: Block,
        fits: BlockFits,
        ridge: float,
        prior: Mapping[str, Linear],
        moments: Moments,
        basis: torch.Tensor,
    ) -> QuantizedWriters:
        """The fit at one λ, rounded on the basis after the block.

        Args:
            prior: the output weights before the fit, see `slicegpt.slicing.refit.fit_block`.
            moments: what they were fitted to.
        """
        writers, kept, schemes = fits.writers[ridge], None, self.schemes(block)
        columns = {
            part: kept_rows(self.config, part, WRITTEN_BY[part], fits)
            for part in writers
            if part != "shortcut"
        }
        if any(own is not None for own in columns.values()):
            start, pieces = 0, []
            for part, full in writers.items():
                count, own = full.weight.shape[1], columns.get(part)
                own = torch.arange(count, device=moments.device) if own is None else own.to(moments.device)
                pieces.append(own + start)
                start += count
            kept = torch.cat(pieces)
        rotated = {part: rotate_writer(full, basis) for part, full in writers.items()}
        weight = torch.cat([layer.weight for layer in rotated.values()], dim=1)
        weight = weight if kept is None else weight[:, kept]
        segments = []
        for part, full in writers.items():
            own = columns.get(part)
            count = full.weight.shape[1] if own is None else len(own)
            segments.append(Segment(count, None if part == "shortcut" else schemes[part][WRITING[part]]))
        before = prior_of(prior.values())
        system, _ = self.objective.normal_equations(moments, ridge, before, kept)
        matrices, rest = gptq(weight, system, segments, self.dtype)
        parts = [part for part in writers if part != "shortcut"]
        biases = {part: layer.bias for part, layer in rotated.items()}
        if before.bias is not None:
            # The best intercept takes up what the rounded weights write on average.
            stored = torch.cat([*(matrix.dequantise().double() for matrix in matrices), rest], dim=1)
            mean = moments.inputs / moments.tokens
            shift = (weight - stored) @ (mean if kept is None else mean[kept])
            first = next(part for part, bias in biases.items() if bias is not None)
            biases[first] = biases[first] + shift
        shortcut = rest if "shortcut" in writers else None
        return QuantizedWriters(dict(zip(parts, matrices, strict=True)), shortcut, biases, columns)
