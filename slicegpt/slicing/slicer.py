"""One run of slicing, boundary by boundary.

For every block: its stream is brought onto the boundary before it (`h = x V`), the block runs there with its
final weights, up to its output at full width; the covariance of what comes out gives the next boundary's basis,
and that basis gives the block's output weights and shortcut. So every block sees the errors of those before it,
and each block runs once (paper section 3.4 and appendix A.1; the published code runs every layer twice).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.folding import (
    OUTPUT_NORMS,
    TABLE_ROWS,
    centre,
    folded_head_rows,
    output_norm_weight,
    reader_state,
    rotated_rows,
)
from slicegpt.conversion.quantization import with_quantization
from slicegpt.conversion.rounding import QuantizedMatrix
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint, DenseLayer, Linear
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.slicing.allocation import deletes_heads, deletes_neurons
from slicegpt.slicing.bases import Bases
from slicegpt.slicing.block_state import reader_entries, rounded_entries, writer_entries
from slicegpt.slicing.blocks import (
    Block,
    blocks_of,
    dense_block,
    dense_writers,
    file_readers,
    fitted_scale,
    group_rows,
    lifted_block,
    remaining_writers,
    scaled_writers,
)
from slicegpt.slicing.keeping import Keeper
from slicegpt.slicing.mixture_moments import MixtureMoments
from slicegpt.slicing.mixture_refit import fit_mixture
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions, SlicingReport
from slicegpt.slicing.propagation import Propagation, check_finite
from slicegpt.slicing.quantizing import QuantizedWriters, Quantizer, round_table
from slicegpt.slicing.refit import BlockFits, KeptHeads, fit_block
from slicegpt.slicing.resuming import Resumed
from slicegpt.slicing.reuse import Reuse
from slicegpt.slicing.rounds import Rounds
from slicegpt.slicing.shared_basis import shares_basis
from slicegpt.slicing.sink import Pieces, Sink


def fitted_batches(count: int, share: float) -> int:
    """How many of `count` calibration batches the refit fits to, the first ones: `share` of them, rounded up."""
    return math.ceil(round(share * count, 9))


class Slicer(Bases, Resumed, Rounds):
    """One run of slicing; holds what the steps share.

    Args:
        objective: of the refit.
        ridges: its λ. The tokens go on through the network with the fit at the first; with the same bases and neurons
            every one has entries of its own in the sink.
        sink: where the model's tensors go, each one as soon as it is final.
        keeper: keeps what an interrupted run needs to go on, and has what was kept of one.
        reuse: what other sizes of the same model share with this one.
        shared: covariance [D, D] float64 that the basis of all boundaries is chosen from, where they share one; None on
            all ranks but the first, and where a snapshot has that basis.

    Attributes:
        ridges: those that something is fitted at; the first one alone where there is no refit.
        remaining: of each refitted block its index, and `BlockFits.remaining`.
        few_tokens: of blocks by their index, the experts that had fewer calibration tokens than neurons.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        options: SlicingOptions,
        objective: Objective,
        ridges: Sequence[float],
        progress: Progress,
        sink: Sink,
        keeper: Keeper | None = None,
        reuse: Reuse | None = None,
        shared: torch.Tensor | None = None,
    ):
        self.shares, self.shared = shares_basis(config), shared
        self.checkpoint = checkpoint
        self.config = config
        self.options = options
        self.ranks = options.ranks
        self.objective = objective
        self.progress = progress
        self.sink = sink
        self.keeper = keeper or Keeper()
        self.mean_subtraction = checkpoint.family.mean_subtraction
        self.report = SlicingReport()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.reading: tuple[int, DenseLayer] | None = None
        self.remaining: list[tuple[int, dict[float, float | None]]] = []
        self.few_tokens: dict[int, list[int]] = {}
        self.blocks = blocks_of(config)
        self.prunes = deletes_neurons(config) or deletes_heads(config)
        if self.prunes and not options.refit:
            heads = "group_heads" if config.layer_key_value_heads is None else "kv_groups"
            deleted = "neurons" if deletes_neurons(config) else heads
            raise SliceGPTError("which of them to delete is decided by the refit, which is off", deleted)
        sliced = any(width < config.dense_hidden_size for width in config.boundary_widths)
        self.refits = options.refit and (sliced or self.prunes or options.weights is not None)
        self.quantizer = None
        if options.weights is not None:
            if not self.refits or not batches:
                raise SliceGPTError("needs the output refit and calibration tokens", "quantize")
            self.quantizer = Quantizer(config, options.weights, objective, options.dtype)
        self.ridges = tuple(ridges) if self.refits else (ridges[0],)
        fitted = fitted_batches(len(batches), options.fitted) if self.refits else 0
        self.propagation = Propagation(config, batches, options, fitted, reuse)
        self.stage = self.propagation.stage
        self.report.tokens = self.propagation.tokens
        self.report.seconds = self.stage.seconds

    def agreed(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on every rank; the others wait here while it decides."""
        if self.ranks.size == 1:
            return make()
        with self.stage("exchange"):
            return self.ranks.decide(make)

    def passes(self, block: Block) -> int:
        """How many times a calibration batch passes a block, or is read for it, over all batches."""
        if not self.needs_pass(block):
            return 0
        count = self.propagation.count
        rounding = 0
        if self.quantizer is not None:
            rounding = count * (2 if self.needs_covariance(block.index + 1) else 1)
        return count + self.propagation.fitted + rounding

    # --- steps -------------------------------------------------------------------------------------------------

    def slice_embedding(self) -> torch.Tensor:
        """Embedding, its projection and learned positions; returns the basis of boundary 0."""
        device, dtype = self.options.device, self.options.dtype
        covariance = self.new_covariance(0)
        with self.stage("signals"):
            self.propagation.start(self.checkpoint, covariance)
        if covariance is not None and self.options.vocabulary_prior and self.ranks.first:
            with self.stage("covariance"):
                pieces = self.checkpoint.embedding.split(TABLE_ROWS)
                rows = (centre(piece.to(device), self.mean_subtraction) for piece in pieces)
                covariance.add_prior(rows, self.options.vocabulary_prior)
        basis, _ = self.agree_on_basis(0, covariance, None, None)
        rounds_tables = self.quantizer is not None and self.quantizer.weights.tables
        if rounds_tables:
            self.quantize_table(basis)
        if not self.ranks.first:
            return basis
        with self.stage("rotation"):
            table, positions = self.checkpoint.embedding, self.checkpoint.positions
            if self.config.embed_projection:
                identity = torch.eye(len(basis), device=device)
                projection = torch.cat([*self.rotated(identity, basis)])
                self.store("model.embed_projection.weight", projection.mT.contiguous())
            if not rounds_tables:
                whole = self.config.embed_projection
                self.store(
                    "model.embed_tokens.weight", table.to(dtype) if whole else self.rotated(table, basis)
                )
            if positions is not None:
                self.store("model.embed_positions.weight", self.rotated(positions, basis))
        return basis

    def store(self, name: str, value: Pieces) -> None:
        self.sink.store({name: value})

    def rotated(self, table: torch.Tensor, basis: torch.Tensor) -> Iterator[torch.Tensor]:
        return rotated_rows(table, basis, self.mean_subtraction, self.options.dtype)

    def layer_of(self, block: Block) -> DenseLayer:
        """Read once for all of its blocks, and only the caller's after the last of them."""
        index, layer = self.reading or (None, None)
        if index != block.layer:
            layer = self.checkpoint.layer(block.layer)
        last = self.config.parallel_blocks or block.dense_parts == ("mlp",)
        self.reading = None if last else (block.layer, layer)
        return layer

    def slice_block(self, block: Block, basis: torch.Tensor) -> torch.Tensor:
        """One block, whose stream stands in `basis`; returns the next boundary's basis.

        Its input weights are final. Its output weights are refitted in three steps: the moments of the calibration
        tokens before it writes, the fits to them at every λ, and the tokens' way past the block with the fit at the
        first λ. The stream that comes out chooses the next basis, which the output weights are then brought onto.

        Weights of few bits are rounded on the way, see `slicegpt.slicing.quantizing`.
        """
        config, dtype, device = self.config, self.options.dtype, self.options.device
        layer, rounds = self.layer_of(block), self.quantizer is not None
        with self.stage("rotation"):
            exact = torch.promote_types(dtype, torch.float32) if rounds else dtype
            readers = {part: reader_state(part, layer, basis, exact, device) for part in block.parts}
            dense = dense_writers(config, block, layer, device)
            own = remaining_writers(block, dense)
            shortcut = {"shortcut": Linear(basis)} if config.shortcuts[block.index] == "dense" else {}
            # A dense shortcut is a matrix of its own: where there is a refit, it is fitted like the others.
            writers = own | shortcut if self.refits and not block.sparse else own
            lifted = None
            # The constant that a deleted part leaves passes no norm.
            behind = bool(block.parts)
            if self.needs_pass(block):
                output_norm = output_norm_weight(block.dense_parts[0], layer, device) if behind else None
                lifted = lifted_block(config, block, basis, readers, writers, dtype, output_norm)
            scale = fitted_scale(block, layer, device) if behind else None
            output_norms = {
                f"{block.prefix}.{OUTPUT_NORMS[part]}.weight": weight.to(dtype)
                for part in block.parts
                if (weight := output_norm_weight(part, layer, device)) is not None
            }

        packed = self.quantize_readers(block, readers, lifted) if rounds else {}
        fits, kept, moments = BlockFits(dict.fromkeys(self.ridges, own | shortcut)), None, None
        if self.refits:
            with self.stage("rotation"):
                teacher_dtype = self.objective.teacher_dtype(dtype, device)
                teacher = dense_block(config, block, layer, dense, teacher_dtype, device)
            del layer  # what is fitted has its output weights; the others are as large as two of them
            moments, kept = self.propagation.collect(block, lifted, teacher, self.objective)
            del teacher
            if self.ranks.first:
                # On a GPU they would have to come back for the block to write.
                aside = partial(file_readers, readers, lifted, self.options.scratch)
                fits = self.fit(block, writers, scale, moments, aside if device.type == "cpu" else None)
            lifted.set_writers(self.agreed(lambda: fits.writers[self.ridges[0]]))
            if not rounds:
                moments = None  # [K, K + D] in float64
            if block.sparse:
                fits = replace(
                    fits, writers={ridge: {**one, **shortcut} for ridge, one in fits.writers.items()}
                )
        covariance = self.new_covariance(block.index + 1)
        if lifted is not None and (covariance is not None or not rounds):
            self.propagation.write(block, lifted, covariance, kept, final=not rounds)

        next_basis, factor = self.agree_on_basis(block.index + 1, covariance, block, basis)
        rounded = {}
        if rounds:
            rounded = self.quantize_writers(block, lifted, fits, writers, moments, next_basis)
            del moments
            self.propagation.write(block, lifted, None, kept)
        if not self.ranks.first:
            return next_basis
        with self.stage("rotation"):
            self.store_block(block, readers, factor, fits, next_basis, packed, rounded)
            self.sink.store(output_norms)
        return next_basis

    def fit(
        self,
        block: Block,
        writers: Mapping[str, Linear],
        scale: torch.Tensor | None,
        moments: Moments | MixtureMoments,
        set_aside: Callable[[], None] | None = None,
    ) -> BlockFits:
        """The output weights at every λ, and which neurons and key/value groups stay where some are deleted.

        `scale`: see `fitted_scale`.
        """
        config = self.config
        neurons = config.neurons[block.layer] if "mlp" in block.parts else None
        if neurons == config.dense_neurons[block.layer]:
            neurons = None
        heads = None
        if "attention" in block.parts and config.attention_heads[block.layer] < config.num_attention_heads:
            kept = config.key_value_heads[block.layer], config.group_heads[block.layer]
            heads = KeptHeads(group_rows(config), config.head_dim, *kept)
        with self.stage("refit"):
            check_finite(moments, block)
            common = (
                self.objective,
                moments,
                scaled_writers(writers, scale),
                list(self.ridges),
                neurons,
                self.options.scratch,
                set_aside,
            )
            fits = fit_mixture(*common) if block.sparse else fit_block(*common, heads)
            if scale is not None:
                unscaled = {ridge: scaled_writers(own, 1 / scale) for ridge, own in fits.writers.items()}
                fits = replace(fits, writers=unscaled)
        if block.sparse and (few := moments.starved()):
            self.few_tokens[block.index] = few
        self.remaining.append((block.index, fits.remaining))
        return fits

    def store_block(
        self,
        block: Block,
        readers: Mapping[str, dict[str, torch.Tensor]],
        factor: torch.Tensor | None,
        fits: BlockFits,
        basis: torch.Tensor,
        packed: Mapping[str, Mapping[str, QuantizedMatrix]],
        rounded: Mapping[float, QuantizedWriters],
    ) -> None:
        """A block's state: its input weights, the factor of a compact shortcut, and the output weights on `basis`.

        Args:
            packed, rounded: `quantize_readers`' and `quantize_writers`'; empty where nothing is rounded.
        """
        self.sink.store(reader_entries(self.config, block, readers, fits, packed))
        if self.config.shortcuts[block.index] == "compact":
            shortcut = factor.mT.to(self.options.dtype).contiguous()
            self.store(f"{block.prefix}.{block.shortcut}.factor", shortcut)
        for ridge, writers in fits.writers.items():
            if ridge in rounded:
                entries = rounded_entries(block, rounded[ridge], self.options.dtype)
            else:
                entries = writer_entries(self.config, block, writers, fits, basis, self.options.dtype)
            self.sink.store_fit(ridge, entries)

    def slice_head(self, basis: torch.Tensor) -> None:
        """Final norm and head, in the basis of the last boundary."""
        device, dtype = self.options.device, self.options.dtype
        norm, head = self.checkpoint.final_norm, self.checkpoint.head
        if not self.config.tie_word_embeddings:
            rounds = self.quantizer is not None and self.quantizer.weights.tables
            wide = torch.promote_types(dtype, torch.float32) if rounds else dtype
            rows, bias = folded_head_rows(head, norm, basis, wide)
            if rounds:
                self.sink.store(round_table(rows, dtype).entries("lm_head"))
                bias = None if bias is None else bias.to(dtype)
            else:
                self.store("lm_head.weight", rows)
            if bias is not None:
                self.store("lm_head.bias", bias)
            return
        weight = torch.ones(len(basis), device=device) if norm.weight is None else norm.weight.to(device)
        if self.config.head_projection:
            scale = (basis.shape[0] / basis.shape[1]) ** 0.5
            projection = weight.double()[:, None] * basis * scale
            self.store("model.head_projection.weight", projection.to(dtype).contiguous())
        else:
            self.store("model.norm.weight", weight.to(dtype))
        if norm.bias is not None:
            owner = "head_projection" if self.config.head_projection else "norm"
            self.store(f"model.{owner}.bias", norm.bias.to(dtype))
        if head.bias is not None:
            self.store("lm_head.bias", head.bias.to(dtype))

    @torch.no_grad()
    def run(self) -> None:
        """Slice everything: all of the model's tensors are in the sink; of several ranks, in that of the first."""
        blocks = self.blocks
        if self.ranks.first:
            stored = with_quantization(self.config, self.options.weights)
            self.sink.open(stored, self.options.dtype, self.ridges)
        tokens, layers = self.propagation.tokens, self.config.num_hidden_layers
        found = self.keeper.found("slicing")
        done = self.agreed(lambda: None if found is None else found.done)
        steps, passed = (sum(map(self.passes, some)) for some in (blocks, blocks[: done or 0]))
        with self.progress.stage("slicing", steps, "steps", tokens, passed) as self.propagation.advance:
            if done is None:
                basis, done = self.slice_embedding(), 0
                self.keep(done, basis)
            else:
                basis = self.restore(found, done)
            for block in blocks[done:]:
                self.propagation.advance.note(f"{block.layer} of {layers} layers")
                basis = self.slice_block(block, basis)
                self.keep(block.index + 1, basis)
            if not self.ranks.first:
                return
            self.slice_head(basis)
