"""The calibration tokens on their way through the network: block by block, in the sliced and in the dense model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.folding import centre
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint, Linear
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling import SlicedConfig, SlicedModel
from slicegpt.modeling.layers import SlicedRotaryEmbedding
from slicegpt.slicing.blocks import Block, LiftedBlock
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.refit import JoinedBatches, Moments, token_weights
from slicegpt.slicing.streams import Signals, TokenBatch, choose_place


class Stopwatch:
    """Seconds spent in each of several stages, device work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - start


def select(states: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """[batch, tokens, ...] to [n, ...]: the tokens of a mask, all of them (a view) where it is None."""
    return states.flatten(0, 1) if tokens is None else states[tokens]


def check_finite(sums: Covariance | Moments, block: Block | None) -> None:
    """One clear error for a stream that overflowed; `block` is what it comes from, None the embedding."""
    tensors = (sums.matrix,) if isinstance(sums, Covariance) else (sums.gram, sums.cross, sums.energy)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        where = "the embedding" if block is None else f"layer {block.layer} ({' and '.join(block.parts)})"
        raise SliceGPTError(
            f"activations: NaN or infinity in the stream after {where}; if the model is sound, the dtype "
            "overflows: try --dtype float32 or bfloat16"
        )


class Passes:
    """The streams of all calibration tokens at full width, and how they pass a block.

    Args:
        batches: calibration tokens.
        dtype: of the streams.
        device: where blocks run.
        place: where streams are kept: "auto", "device" or "host", see `choose_place`.
        fitted: so many batches, the first ones, are refitted to: the dense model's stream is carried beside theirs.
    """

    def __init__(
        self,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        dtype: torch.dtype,
        device: torch.device,
        place: str,
        fitted: int = 0,
    ):
        self.config, self.dtype, self.device = config, dtype, device
        self.fitted = fitted
        self.tokens = sum(batch.tokens for batch in batches)
        tokens = sum(batch.input_ids.numel() for batch in [*batches, *batches[:fitted]])
        where = choose_place(place, tokens * config.dense_hidden_size * dtype.itemsize, device)
        self.signals = Signals(batches, device, where)
        self.teacher = Signals(batches[:fitted], device, where)
        self.stage = Stopwatch(device)
        self.advance: Callable[[int], None] = lambda steps: None
        with torch.device("meta"):
            self.shell = SlicedModel(config)  # for its masks and rotary positions; its weights are never used
        if self.shell.rotary_emb is not None:
            self.shell.rotary_emb = SlicedRotaryEmbedding(config).to(device)

    def start(self, checkpoint: Checkpoint, covariance: Covariance | None) -> None:
        """Fill the streams before the first block."""
        table, positions = checkpoint.embedding.to(self.device), checkpoint.positions
        positions = None if positions is None else positions.to(self.device)
        for index, batch in enumerate(self.signals.batches):
            stream = table[batch.input_ids]
            if positions is not None:
                ids = self.shell.default_position_ids(stream, batch.attention_mask, 0)
                stream = stream + positions[ids + self.config.position_offset]
            if checkpoint.family.mean_subtraction:
                stream = centre(stream, True)
            stream = stream.to(self.dtype)
            if covariance is not None:
                covariance.add(stream, batch.attention_mask)
            self.signals[index] = stream
            if index < self.fitted:
                self.teacher[index] = stream

    def inputs(self, block: Block, stream: torch.Tensor, batch: TokenBatch) -> dict:
        """Attention mask and rotary positions, as the block's attention takes them."""
        shape = stream.shape[:2]
        positions = torch.arange(shape[1], device=stream.device).expand(shape)
        masks, rotary = self.shell.block_inputs(stream, positions, batch.attention_mask)
        mask = masks[self.config.layer_types[block.layer]]
        return {"attention_mask": mask, "position_embeddings": rotary}

    def run(self, block: Block, lifted: LiftedBlock, covariance: Covariance | None) -> None:
        """Bring every batch past a block, and add it to the covariance of the next boundary."""
        for index, batch, stream in self.signals:
            with self.stage("signals"):
                self.signals[index] = out = lifted(stream, **self.inputs(block, stream, batch))
            if covariance is not None:
                with self.stage("covariance"):
                    covariance.add(out, batch.attention_mask)
            self.advance(1)

    def run_dense(self, block: Block, dense: LiftedBlock, moments: Moments | None) -> None:
        """Bring every batch past the dense model's block, and add it to the moments of what it writes."""
        joined = None if moments is None else JoinedBatches(moments)
        for index, batch, stream in self.signals:
            inputs = self.inputs(block, stream.to(dense.dtype), batch)
            carried, activations = dense.activations(stream, **inputs)
            self.signals[index] = out = dense.write(carried, activations)
            if joined is not None:
                self.add_moments(joined, batch, activations.to(out.dtype), out - carried, stream, out)
        if joined is not None:
            joined.finish()

    def add_moments(
        self,
        joined: JoinedBatches,
        batch: TokenBatch,
        activations: torch.Tensor,
        missing: torch.Tensor,
        before: torch.Tensor,
        behind: torch.Tensor,
    ) -> None:
        """Add a batch's tokens: what a block writes from, what it has to write, and the dense stream around it."""
        weights = token_weights(before, behind, self.config.rms_norm_eps)
        present = None if batch.attention_mask is None else batch.attention_mask.bool()
        joined.add(*(select(states, present) for states in (activations, missing, weights)))

    def run_refitted(
        self,
        block: Block,
        lifted: LiftedBlock,
        teacher: LiftedBlock,
        refit: Callable[[Moments], dict[str, Linear]],
        covariance: Covariance | None,
    ) -> None:
        """As `run`, with the output weights that `refit` makes of the moments of the fitted batches.

        Their activations are kept from the moments to the output where they take at most half of the free memory;
        otherwise the block computes them twice.
        """
        groups, dense_width = lifted.groups, self.config.dense_hidden_size
        joined = JoinedBatches(Moments(groups, dense_width, self.device))
        elements = sum(batch.input_ids.numel() for batch in self.teacher.batches) * sum(groups)
        keep = elements * self.dtype.itemsize <= free_memory(self.device) // 2
        kept: list[torch.Tensor | None] = []
        for (index, batch, dense), (_, _, stream) in zip(self.teacher, self.signals, strict=False):
            inputs = self.inputs(block, stream, batch)
            with self.stage("teacher"):
                own = inputs
                if teacher.dtype != self.dtype:
                    own = self.inputs(block, dense.to(teacher.dtype), batch)
                self.teacher[index] = target = teacher(dense, **own)
            self.advance(1)
            with self.stage("signals"):
                carried, activations = lifted.activations(stream, **inputs)
                missing = target if carried is None else target - carried
            with self.stage("refit"):
                self.add_moments(joined, batch, activations, missing, dense, target)
            if keep:
                kept.append(activations)
                if carried is not None:
                    self.signals[index] = carried
        with self.stage("refit"):
            lifted.set_writers(refit(joined.finish()))
        del joined
        for index, batch, stream in self.signals:
            with self.stage("signals"):
                if index < len(kept):
                    carried, activations = None if lifted.writes_shortcut else stream, kept[index]
                    kept[index] = None
                else:
                    carried, activations = lifted.activations(stream, **self.inputs(block, stream, batch))
                self.signals[index] = out = lifted.write(carried, activations)
            if covariance is not None:
                with self.stage("covariance"):
                    covariance.add(out, batch.attention_mask)
            self.advance(1)
