"""One run of slicing, boundary by boundary.

For every block: its stream is brought onto the boundary before it (`h = x V`), the block runs there with its
final weights, up to its output at full width; the covariance of what comes out gives the next boundary's basis,
and that basis gives the block's output weights and shortcut. So every block sees the errors of those before it,
and each block runs once (paper section 3.4 and appendix A.1; the published code runs every layer twice).
"""

import math
from collections.abc import Sequence

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.canonical import build_model
from slicegpt.conversion.folding import (
    TABLE_ROWS,
    centre,
    fold_head,
    named,
    reader_state,
    rotate_table,
    rotate_writer,
)
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint, DenseLayer, Linear
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.progress import Progress
from slicegpt.slicing.allocation import deletes_neurons
from slicegpt.slicing.blocks import (
    MODULE_NAMES,
    WRITER_NAMES,
    Block,
    LiftedBlock,
    blocks_of,
    dense_block,
    dense_writers,
    neuron_rows,
)
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.eigensolver import leading_eigenvectors
from slicegpt.slicing.neurons import choose_neurons
from slicegpt.slicing.options import SlicingOptions, SlicingReport
from slicegpt.slicing.propagation import Passes, check_finite
from slicegpt.slicing.refit import Moments, Writer, fit, normal_equations, prior_of, teacher_dtype
from slicegpt.slicing.rotation import align, random_orthogonal


def fitted_batches(count: int, share: float) -> int:
    """How many of `count` calibration batches the refit fits to, the first ones: `share` of them, rounded up."""
    return math.ceil(round(share * count, 9))


class Slicer:
    """One run of slicing; holds what the steps share.

    Args:
        ridges: λ of the refit. The tokens go on through the network with the fit at the first; with the same bases and
            neurons every other one has entries of its own in `fits`.

    Attributes:
        carried: the first of `ridges`.
        fits: of each λ the entries of the model's state that depend on it.
        left: of each refitted block its index, and for each λ the fraction of its squared error, before the fit, that
            is left.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        options: SlicingOptions,
        ridges: Sequence[float],
        progress: Progress,
    ):
        self.checkpoint = checkpoint
        self.config = config
        self.options = options
        self.progress = progress
        self.mean_subtraction = checkpoint.family.mean_subtraction
        self.report = SlicingReport()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.state: dict[str, torch.Tensor] = {}
        self.left: list[tuple[int, dict[float, float | None]]] = []
        self.prunes = deletes_neurons(config)
        if self.prunes and not options.refit:
            raise SliceGPTError("--neurons: which of them to delete is decided by the refit, got --no-refit")
        sliced = any(width < config.dense_hidden_size for width in config.boundary_widths)
        self.refits = options.refit and (sliced or self.prunes)
        self.carried = ridges[0]
        self.fits: dict[float, dict[str, torch.Tensor]]
        self.fits = {ridge: {} for ridge in (ridges if self.refits else (self.carried,))}
        fitted = fitted_batches(len(batches), options.fitted) if self.refits else 0
        self.passes = Passes(config, batches, options.dtype, options.device, options.place, fitted)
        self.stage = self.passes.stage
        self.report.tokens = self.passes.tokens
        self.report.seconds = self.stage.seconds

    def store(
        self,
        entries: dict[str, torch.Tensor],
        prefix: str = "",
        state: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add entries to `state`, on the CPU; None: to that of every λ."""
        state = self.state if state is None else state
        state |= {f"{prefix}{name}": tensor.to("cpu") for name, tensor in entries.items()}

    # --- bases -------------------------------------------------------------------------------------------------

    def is_fixed(self, boundary: int) -> bool:
        """The basis is the identity: a tied head reads the stream as the original did; or nothing is sliced."""
        config = self.config
        full = config.boundary_widths[boundary] == config.dense_hidden_size
        tied_end = config.tie_word_embeddings and boundary == config.num_blocks
        return full and (tied_end or all(kind == "identity" for kind in config.shortcuts))

    def needs_covariance(self, boundary: int) -> bool:
        """Only a sliced boundary has a subspace to choose; in "pca" orientation every free one has a basis to."""
        sliced = self.config.boundary_widths[boundary] < self.config.dense_hidden_size
        return sliced or (self.options.orientation == "pca" and not self.is_fixed(boundary))

    def needs_pass(self, block: Block) -> bool:
        """The calibration tokens pass a block that is refitted, or has a boundary behind that needs its covariance."""
        behind = range(block.index + 1, self.config.num_blocks + 1)
        return self.refits or any(self.needs_covariance(boundary) for boundary in behind)

    def choose_basis(
        self,
        boundary: int,
        covariance: Covariance | None,
        block: Block | None,
        previous: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The basis [D, d] of the boundary behind `block`, and the factor of a compact shortcut that leads there."""
        dense_width, width = self.config.dense_hidden_size, self.config.boundary_widths[boundary]
        device, orientation = self.options.device, self.options.orientation
        eigenvalues, vectors = None, torch.eye(dense_width, dtype=torch.float64, device=device)
        if covariance is not None:
            check_finite(covariance, block)
            with self.stage("eigensolver"):
                eigenvalues, vectors = leading_eigenvectors(covariance.matrix, dense_width)
        self.report.eigenvalues.append(None if eigenvalues is None else eigenvalues.tolist())

        basis, complement = vectors[:, :width], vectors[:, width:]
        if self.is_fixed(boundary):
            return basis, None
        if orientation == "random":
            return basis @ random_orthogonal(width, self.generator).to(device), None
        if orientation == "aligned" and previous is not None and previous.shape[1] <= width:
            with self.stage("rotation"):
                return align(previous, basis, complement)
        return basis, None

    def new_covariance(self, boundary: int) -> Covariance | None:
        if not self.needs_covariance(boundary):
            return None
        config, options = self.config, self.options
        if not len(self.passes.signals):
            raise SliceGPTError(f"batches: boundary {boundary} needs calibration tokens, got none")
        return Covariance(config.dense_hidden_size, options.signal, config.rms_norm_eps, options.device)

    # --- refit -------------------------------------------------------------------------------------------------

    def refitted(
        self, block: Block, writers: dict[str, Linear], moments: Moments
    ) -> tuple[dict[float, dict[str, Linear]], torch.Tensor | None]:
        """For each λ the output weights [D, K] fitted to the dense model's stream, and the bias where there is one.

        And the MLP neurons that stay, where some go: the columns of the others are 0.
        """
        check_finite(moments, block)
        prior, kept = prior_of(writers.values()), None
        count = self.config.neurons[block.layer]
        if count < self.config.dense_intermediate_size and "mlp" in writers:
            group = neuron_rows(writers)
            kept = choose_neurons(*normal_equations(moments, self.carried, prior), group, count)
        before, fitted, left = prior.loss(moments), {}, {}
        for ridge in self.fits:
            writer = fit(moments, ridge, prior, kept)
            fitted[ridge] = self.separate(writer, writers, moments)
            # A block that nothing was taken from has rounding errors before the fit, and no fraction of them.
            left[ridge] = writer.left / before if before > 1e-9 * moments.energy.item() else None
        self.left.append((block.index, left))
        if kept is None:
            return fitted, None
        return fitted, kept[(kept >= group.start) & (kept < group.stop)] - group.start

    def separate(self, fitted: Writer, writers: dict[str, Linear], moments: Moments) -> dict[str, Linear]:
        """What was fitted side by side, as one layer for each of `writers`."""
        weights = fitted.weight.mT.split(moments.groups, dim=1)
        layers = {
            part: Linear(weight, None if writer.bias is None else torch.zeros_like(writer.bias))
            for (part, writer), weight in zip(writers.items(), weights, strict=True)
        }
        if fitted.bias is not None:  # parallel parts: their sum is what counts, and the first takes it
            first = next(part for part, writer in writers.items() if writer.bias is not None)
            layers[first] = Linear(layers[first].weight, fitted.bias)
        return layers

    # --- steps -------------------------------------------------------------------------------------------------

    def slice_embedding(self) -> torch.Tensor:
        """Embedding, its projection and learned positions; returns the basis of boundary 0."""
        device, dtype = self.options.device, self.options.dtype
        covariance = self.new_covariance(0)
        with self.stage("signals"):
            self.passes.start(self.checkpoint, covariance)
        if covariance is not None and self.options.vocabulary_prior:
            with self.stage("covariance"):
                pieces = self.checkpoint.embedding.split(TABLE_ROWS)
                rows = (centre(piece.to(device), self.mean_subtraction) for piece in pieces)
                covariance.add_prior(rows, self.options.vocabulary_prior)
        basis, _ = self.choose_basis(0, covariance, None, None)
        with self.stage("rotation"):
            table, positions = self.checkpoint.embedding, self.checkpoint.positions
            if self.config.embed_projection:
                projection = rotate_table(
                    torch.eye(len(basis), device=device), basis, self.mean_subtraction, dtype
                )
                self.store({"model.embed_projection.weight": projection.mT.contiguous()})
                self.store({"model.embed_tokens.weight": table.to(dtype)})
            else:
                rows = rotate_table(table, basis, self.mean_subtraction, dtype)
                self.store({"model.embed_tokens.weight": rows})
            if positions is not None:
                rows = rotate_table(positions, basis, self.mean_subtraction, dtype)
                self.store({"model.embed_positions.weight": rows})
        return basis

    def slice_block(self, block: Block, layer: DenseLayer, basis: torch.Tensor) -> torch.Tensor:
        """One block: input weights, a pass over the calibration tokens, output weights; returns the next basis."""
        dtype, device, boundary = self.options.dtype, self.options.device, block.index + 1
        kind = self.config.shortcuts[block.index]
        with self.stage("rotation"):
            readers = {part: reader_state(part, layer, basis, dtype) for part in block.parts}
            writers = dense_writers(self.config, block, layer, device)
        covariance, neurons = self.new_covariance(boundary), None
        fits = dict.fromkeys(self.fits, writers)
        if self.refits:
            with self.stage("rotation"):
                teacher = dense_block(
                    self.config, block, layer, writers, teacher_dtype(dtype, device), device
                )
                if kind == "dense":  # a matrix of its own, so it is fitted like the others
                    writers["shortcut"] = Linear(basis)
                lifted = LiftedBlock(self.config, block, basis, readers, writers, dtype)

            def refit(moments: Moments) -> dict[str, Linear]:
                nonlocal fits, neurons
                fits, neurons = self.refitted(block, writers, moments)
                return fits[self.carried]

            self.passes.run_refitted(block, lifted, teacher, refit, covariance)
        elif self.needs_pass(block):
            with self.stage("rotation"):
                lifted = LiftedBlock(self.config, block, basis, readers, writers, dtype)
            self.passes.run(block, lifted, covariance)
        next_basis, factor = self.choose_basis(boundary, covariance, block, basis)

        with self.stage("rotation"):
            for part, state in readers.items():
                if part == "mlp" and neurons is not None:
                    state = {name: rows[neurons] for name, rows in state.items()}
                self.store(state, f"{block.prefix}.{MODULE_NAMES[part]}.")
            if kind == "compact":
                self.store({f"{block.prefix}.{block.shortcut}.factor": factor.mT.to(dtype).contiguous()})
            for ridge, fitted in fits.items():
                if kind == "dense" and "shortcut" not in fitted:
                    fitted = fitted | {"shortcut": Linear(basis)}
                self.store(self.writer_state(block, fitted, neurons, next_basis), state=self.fits[ridge])
        return next_basis

    def writer_state(
        self, block: Block, writers: dict[str, Linear], neurons: torch.Tensor | None, basis: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """State of the layers that write the stream onto the basis behind a block."""
        state: dict[str, torch.Tensor] = {}
        for part, full in writers.items():
            writer, name = rotate_writer(full, basis), f"{block.prefix}.{block.shortcut}"
            if part != "shortcut":
                name = f"{block.prefix}.{MODULE_NAMES[part]}.{WRITER_NAMES[part]}"
            if part == "mlp" and neurons is not None:
                writer = Linear(writer.weight[:, neurons], writer.bias)
            state |= named(name, writer, self.options.dtype)
        return state

    def slice_head(self, basis: torch.Tensor) -> None:
        """Final norm and head, in the basis of the last boundary."""
        device, dtype = self.options.device, self.options.dtype
        norm, head = self.checkpoint.final_norm, self.checkpoint.head
        if not self.config.tie_word_embeddings:
            self.store(named("lm_head", fold_head(head, norm, basis, dtype), dtype))
            return
        weight = torch.ones(len(basis), device=device) if norm.weight is None else norm.weight.to(device)
        if self.config.head_projection:
            scale = (basis.shape[0] / basis.shape[1]) ** 0.5
            projection = weight.double()[:, None] * basis * scale
            self.store({"model.head_projection.weight": projection.to(dtype).contiguous()})
        else:
            self.store({"model.norm.weight": weight.to(dtype)})
        if norm.bias is not None:
            owner = "head_projection" if self.config.head_projection else "norm"
            self.store({f"model.{owner}.bias": norm.bias.to(dtype)})
        if head.bias is not None:
            self.store({"lm_head.bias": head.bias.to(dtype)})

    @torch.no_grad()
    def run(self) -> SlicedForCausalLM:
        """Slice everything and return the model on the CPU."""
        blocks = blocks_of(self.config)
        steps = sum(map(self.needs_pass, blocks)) * (len(self.passes.signals) + self.passes.fitted)
        with self.progress.stage("slicing", steps, "steps") as self.passes.advance:
            basis = self.slice_embedding()
            for block in blocks:
                basis = self.slice_block(block, self.checkpoint.layer(block.layer), basis)
            self.slice_head(basis)
        return build_model(self.config, self.state | self.fits[self.carried])
