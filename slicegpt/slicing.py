"""The driver: slices a dense model boundary by boundary. It is the only place that knows the order.

For every block: its stream is brought onto the boundary before it (`h = x V`), the block runs there with its
final weights, up to its output at full width; the covariance of what comes out gives the next boundary's basis,
and that basis gives the block's output weights and shortcut. So every block sees the errors of those before it,
and each block runs once (paper section 3.4 and appendix A.1; the published code runs every layer twice).
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from slicegpt.calibration.sampling import CalibrationBatch
from slicegpt.covariance import SIGNALS, Covariance
from slicegpt.eigensolver import leading_eigenvectors
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint, DenseLayer, checkpoint_of
from slicegpt.folding import TABLE_ROWS, centre, fold_head, named, reader_state, rotate_table, writer_state
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM, SlicedModel, WeightlessRMSNorm
from slicegpt.modeling.layers import SlicedAttention, SlicedRotaryEmbedding, build_mlp
from slicegpt.progress import Progress
from slicegpt.rotation import ORIENTATIONS, align, random_orthogonal
from slicegpt.signals import Signals


@dataclass(frozen=True)
class SlicingOptions:
    """How to slice; the widths and shortcuts are in the planned `SlicedConfig`.

    Attributes:
        dtype: of the stored weights and of the calibration passes.
        device: where blocks run and eigenvectors are computed, one layer's weights at a time.
        orientation: "aligned" (needed for compact shortcuts), "random" or "pca": the basis inside each subspace.
        signal: "residual" or "normalized": what the covariance is taken of.
        place: "auto", "device" or "host": where the stream is kept.
        seed: of the random orientation.
        vocabulary_prior: the embedding's basis is chosen from the calibration tokens and, this much beside them,
            from the whole vocabulary, so that tokens which the text never shows keep their embeddings.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    orientation: str = "aligned"
    signal: str = "residual"
    place: str = "auto"
    seed: int = 42
    vocabulary_prior: float = 0.0

    def __post_init__(self):
        for name, value, allowed in (
            ("--orientation", self.orientation, ORIENTATIONS),
            ("--signal", self.signal, SIGNALS),
        ):
            if value not in allowed:
                raise SliceGPTError(f"{name}: must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= self.vocabulary_prior < float("inf"):
            raise SliceGPTError(
                f"--vocabulary-prior: must be a weight of at least 0, got {self.vocabulary_prior}"
            )


@dataclass
class SlicingReport:
    """What slicing saw: calibration tokens, seconds a stage, and eigenvalues [D] a boundary (None: none needed)."""

    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    eigenvalues: list[list[float] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """What lies between two boundaries: attention, MLP, or both in parallel."""

    index: int
    layer: int
    parts: tuple[str, ...]
    shortcut: str

    @property
    def prefix(self) -> str:
        return f"model.layers.{self.layer}"


def blocks_of(config: SlicedConfig) -> list[Block]:
    """The blocks of the network in order."""
    if config.parallel_blocks:
        return [Block(i, i, ("attention", "mlp"), "shortcut") for i in range(config.num_hidden_layers)]
    return [
        Block(2 * i + k, i, (part,), f"{part}_shortcut")
        for i in range(config.num_hidden_layers)
        for k, part in enumerate(("attention", "mlp"))
    ]


MODULE_NAMES = {"attention": "self_attn", "mlp": "mlp"}


class LiftedBlock(nn.Module):
    """A block with its final input weights in the basis of its boundary, and its output at full width.

    Takes and returns the stream at full width: `x -> (x V) Vᵀ + block(norm(x V))`.
    """

    def __init__(
        self,
        config: SlicedConfig,
        block: Block,
        basis: torch.Tensor,
        states: dict[str, dict],
        dtype: torch.dtype,
    ):
        super().__init__()
        dense_width, width = basis.shape
        with torch.device("meta"):
            self.parts = nn.ModuleDict()
            if "attention" in block.parts:
                self.parts["attention"] = SlicedAttention(config, block.layer, width, dense_width)
            if "mlp" in block.parts:
                self.parts["mlp"] = build_mlp(config, width, dense_width)
        for part, state in states.items():
            self.parts[part].load_state_dict(state, assign=True)
        self.norm = WeightlessRMSNorm(width, config.boundary_eps(block.index))
        self.basis = basis.to(dtype)
        self.eval()

    def forward(self, stream: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = stream @ self.basis
        normed = self.norm(hidden_states)
        lifted = hidden_states @ self.basis.mT
        if "attention" in self.parts:
            lifted += self.parts["attention"](normed, **kwargs)[0]
        if "mlp" in self.parts:
            lifted += self.parts["mlp"](normed)
        return lifted


class Slicer:
    """One run of slicing; `slice_model` is its only caller. Holds what the steps share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        options: SlicingOptions,
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
        self.signals = Signals(
            batches, config.dense_hidden_size, options.dtype, options.device, options.place
        )
        self.report.tokens = self.signals.tokens
        with torch.device("meta"):
            self.shell = SlicedModel(config)  # for its masks and rotary positions; its weights are never used
        if self.shell.rotary_emb is not None:
            self.shell.rotary_emb = SlicedRotaryEmbedding(config).to(options.device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to the report, device work included."""
        start = time.perf_counter()
        yield
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)
        self.report.seconds[name] += time.perf_counter() - start

    def store(self, entries: dict[str, torch.Tensor], prefix: str = "") -> None:
        self.state |= {f"{prefix}{name}": tensor.to("cpu") for name, tensor in entries.items()}

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
        """The calibration tokens pass a block where a boundary behind it still needs its covariance."""
        behind = range(block.index + 1, self.config.num_blocks + 1)
        return any(self.needs_covariance(boundary) for boundary in behind)

    def choose_basis(
        self, boundary: int, covariance: torch.Tensor | None, previous: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The basis [D, d] of a boundary, and the factor of a compact shortcut that leads there."""
        dense_width, width = self.config.dense_hidden_size, self.config.boundary_widths[boundary]
        device, orientation = self.options.device, self.options.orientation
        eigenvalues, vectors = None, torch.eye(dense_width, dtype=torch.float64, device=device)
        if covariance is not None:
            with self.stage("eigensolver"):
                eigenvalues, vectors = leading_eigenvectors(covariance, dense_width)
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

    # --- passes ------------------------------------------------------------------------------------------------

    def start_stream(self, covariance: Covariance | None) -> None:
        """Fill the signals with the stream before the first block, at full width."""
        device, dtype = self.options.device, self.options.dtype
        table, positions = self.checkpoint.embedding.to(device), self.checkpoint.positions
        positions = None if positions is None else positions.to(device)
        for index, batch in enumerate(self.signals.batches):
            stream = table[batch.input_ids]
            if positions is not None:
                ids = self.shell.default_position_ids(stream, batch.attention_mask, 0)
                stream = stream + positions[ids + self.config.position_offset]
            if self.mean_subtraction:
                stream = centre(stream, True)
            stream = stream.to(dtype)
            if covariance is not None:
                covariance.add(stream, batch.attention_mask)
            self.signals[index] = stream

    def run_block(self, block: Block, lifted: LiftedBlock, covariance: Covariance | None) -> None:
        """Bring the stream of every batch past a block, and add it to the covariance of the next boundary."""
        for index, batch, stream in self.signals:
            with self.stage("signals"):
                shape = stream.shape[:2]
                positions = torch.arange(shape[1], device=stream.device).expand(shape)
                masks, rotary = self.shell.block_inputs(stream, positions, batch.attention_mask)
                kind = self.config.layer_types[block.layer]
                out = lifted(stream, attention_mask=masks[kind], position_embeddings=rotary)
                self.signals[index] = out
            if covariance is not None:
                with self.stage("covariance"):
                    covariance.add(out, batch.attention_mask)
            self.advance(1)

    def new_covariance(self, boundary: int) -> Covariance | None:
        if not self.needs_covariance(boundary):
            return None
        config, options = self.config, self.options
        if not len(self.signals):
            raise SliceGPTError(f"batches: boundary {boundary} needs calibration tokens, got none")
        return Covariance(config.dense_hidden_size, options.signal, config.rms_norm_eps, options.device)

    @staticmethod
    def check_finite(covariance: Covariance | None, where: str) -> torch.Tensor | None:
        if covariance is None:
            return None
        if not bool(torch.isfinite(covariance.matrix).all()):
            raise SliceGPTError(
                f"activations: NaN or infinity in the stream after {where}; if the model is sound, the dtype "
                "overflows: try --dtype float32 or bfloat16"
            )
        return covariance.matrix

    # --- steps -------------------------------------------------------------------------------------------------

    def slice_embedding(self) -> torch.Tensor:
        """Embedding, its projection and learned positions; returns the basis of boundary 0."""
        device, dtype = self.options.device, self.options.dtype
        covariance = self.new_covariance(0)
        with self.stage("signals"):
            self.start_stream(covariance)
        if covariance is not None and self.options.vocabulary_prior:
            with self.stage("covariance"):
                pieces = self.checkpoint.embedding.split(TABLE_ROWS)
                rows = (centre(piece.to(device), self.mean_subtraction) for piece in pieces)
                covariance.add_prior(rows, self.options.vocabulary_prior)
        basis, _ = self.choose_basis(0, self.check_finite(covariance, "the embedding"), None)
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
        with self.stage("rotation"):
            readers = {part: reader_state(part, layer, basis, dtype) for part in block.parts}
        covariance = self.new_covariance(boundary)
        if self.needs_pass(block):
            with self.stage("rotation"):
                whole = {
                    part: state | writer_state(part, layer, None, self.mean_subtraction, dtype, device)
                    for part, state in readers.items()
                }
                lifted = LiftedBlock(self.config, block, basis, whole, dtype)
            self.run_block(block, lifted, covariance)
        matrix = self.check_finite(covariance, f"layer {block.layer} ({' and '.join(block.parts)})")
        next_basis, factor = self.choose_basis(boundary, matrix, basis)

        with self.stage("rotation"):
            for part, state in readers.items():
                state |= writer_state(part, layer, next_basis, self.mean_subtraction, dtype, device)
                self.store(state, f"{block.prefix}.{MODULE_NAMES[part]}.")
            kind = self.config.shortcuts[block.index]
            if kind == "compact":
                self.store({f"{block.prefix}.{block.shortcut}.factor": factor.mT.to(dtype).contiguous()})
            elif kind == "dense":
                shortcut = (next_basis.mT @ basis).to(dtype).contiguous()
                self.store({f"{block.prefix}.{block.shortcut}.weight": shortcut})
        return next_basis

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
        passes = sum(self.needs_pass(block) for block in blocks) * len(self.signals)
        with self.progress.stage("slicing", passes, "steps") as self.advance:
            basis = self.slice_embedding()
            for block in blocks:
                basis = self.slice_block(block, self.checkpoint.layer(block.layer), basis)
            self.slice_head(basis)
        return build_model(self.config, self.state)


def build_model(config: SlicedConfig, state: dict[str, torch.Tensor]) -> SlicedForCausalLM:
    """A model holding the tensors of `state` themselves (no copy, no initialisation), in eval mode."""
    with torch.device("meta"):
        model = SlicedForCausalLM(config)
    if config.tie_word_embeddings:
        state = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, assign=True)
    if model.model.rotary_emb is not None:
        model.model.rotary_emb = SlicedRotaryEmbedding(config)
    model.tie_weights()
    return model.eval()


def slice_model(
    model: PreTrainedModel,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch] = (),
    options: SlicingOptions | None = None,
    progress: Progress | None = None,
) -> tuple[SlicedForCausalLM, SlicingReport]:
    """Slice, or only rotate, a dense Hugging Face model.

    Args:
        model: of a supported family (`slicegpt.families.FAMILIES`), on the CPU; it is not changed.
        config: planned by `slicegpt.schedule.plan`.
        batches: calibration tokens; needed wherever a boundary is sliced or takes its basis from PCA.
        options: see `SlicingOptions`.
        progress: counts passes of one batch through one block.

    Returns:
        The sliced model, on the CPU in `options.dtype`, and the report.

    Errors:
        `SliceGPTError` for an unsupported model, missing calibration tokens, and NaN or infinity in the
        activations (the layer is named).
    """
    options = options or SlicingOptions()
    slicer = Slicer(checkpoint_of(model), config, batches, options, progress or Progress(quiet=True))
    return slicer.run(), slicer.report
