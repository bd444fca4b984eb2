"""The calibration tokens on their way through the network: block by block, in the sliced and in the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.folding import centre
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling import SlicedConfig, SlicedModel
from slicegpt.modeling.layers import SlicedRotaryEmbedding
from slicegpt.slicing.blocks import Block, LiftedBlock
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.moments import JoinedBatches, Moments
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.reuse import Reuse
from slicegpt.slicing.streams import Streams, TokenBatch, choose_storage
from slicegpt.slicing.timing import StageTimer


def select(states: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """[batch, tokens, ...] to [n, ...]: the tokens of a mask, all of them (a view) where it is None."""
    return states.flatten(0, 1) if tokens is None else states[tokens]


def check_finite(sums: Covariance | Moments, block: Block | None) -> None:
    """One clear error for a stream that overflowed; `block` is what it comes from, None the embedding."""
    if not sums.is_finite():
        where = "the embedding" if block is None else f"layer {block.layer} ({' and '.join(block.parts)})"
        raise SliceGPTError(
            f"activations: NaN or infinity in the stream after {where}; if the model is sound, the dtype "
            "overflows: try dtype float32 or bfloat16"
        )


class Propagation:
    """The streams of all calibration tokens at full width, and how they pass a block.

    Args:
        batches: calibration tokens.
        dtype: of the streams.
        device: where blocks run.
        activation_storage: where streams are kept: "auto", "device" or "host", see `choose_storage`.
        fitted: so many batches, the first ones, are refitted to: the dense model's stream is carried beside theirs.
        reuse: where that stream is kept for other sizes, see `slicegpt.slicing.reuse`.

    Attributes:
        streams: of all batches, in the sliced model.
        dense_streams: of the fitted batches, in the dense model.
        stage: times the stages.
        advance: called with 1 after every pass of one batch through one block.
    """

    def __init__(
        self,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        dtype: torch.dtype,
        device: torch.device,
        activation_storage: str,
        fitted: int = 0,
        reuse: Reuse | None = None,
    ):
        self.reuse = reuse
        self.config, self.dtype, self.device = config, dtype, device
        self.fitted = fitted
        self.tokens = sum(batch.tokens for batch in batches)
        tokens = sum(batch.input_ids.numel() for batch in [*batches, *batches[:fitted]])
        stream_bytes = tokens * config.dense_hidden_size * dtype.itemsize
        storage = choose_storage(activation_storage, stream_bytes, device)
        self.streams = Streams(batches, device, storage)
        self.dense_streams = Streams(batches[:fitted], device, storage)
        self.stage = StageTimer(device)
        self.advance: Callable[[int], None] = lambda steps: None
        with torch.device("meta"):
            self.shell = SlicedModel(config)  # for its masks and rotary positions; its weights are never used
        if self.shell.rotary_emb is not None:
            self.shell.rotary_emb = SlicedRotaryEmbedding(config).to(device)

    def start(self, checkpoint: Checkpoint, covariance: Covariance | None) -> None:
        """Fill the streams before the first block."""
        table, positions = checkpoint.embedding.to(self.device), checkpoint.positions
        positions = None if positions is None else positions.to(self.device)
        for index, batch in enumerate(self.streams.batches):
            stream = table[batch.input_ids]
            if positions is not None:
                ids = self.shell.default_position_ids(stream, batch.attention_mask, 0)
                stream = stream + positions[ids + self.config.position_offset]
            if checkpoint.family.mean_subtraction:
                stream = centre(stream, True)
            stream = stream.to(self.dtype)
            if covariance is not None:
                covariance.add(stream, batch.attention_mask)
            self.streams[index] = stream
            if index < self.fitted:
                self.dense_streams[index] = stream

    # --- what a snapshot of a run holds of it ---

    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of all streams."""
        width = self.config.dense_hidden_size
        return {
            f"{kind}.{index}": (self.dtype, (*batch.input_ids.shape, width))
            for kind, streams in self._kinds()
            for index, batch in enumerate(streams.batches)
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All streams by name, one at a time."""
        for kind, streams in self._kinds():
            for index, _, stream in streams:
                yield f"{kind}.{index}", stream

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the streams from where `tensors` put them; instead of `start`."""
        for kind, streams in self._kinds():
            for index in range(len(streams)):
                streams[index] = tensors[f"{kind}.{index}"].to(self.device)

    def _kinds(self) -> tuple[tuple[str, Streams], ...]:
        return ("streams", self.streams), ("dense_streams", self.dense_streams)

    def inputs(self, block: Block, stream: torch.Tensor, batch: TokenBatch) -> dict:
        """Attention mask and positions, as the block's attention takes them."""
        shape = stream.shape[:2]
        positions = torch.arange(shape[1], device=stream.device).expand(shape)
        masks, rotary = self.shell.block_inputs(stream, positions, batch.attention_mask)
        mask = masks[self.config.layer_types[block.layer]]
        return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": positions}

    def collect(
        self, block: Block, lifted: LiftedBlock, teacher: LiftedBlock, objective: Objective
    ) -> tuple[Moments, list[torch.Tensor | None]]:
        """Moments of the fitted batches before a block writes; their dense streams pass the dense block.

        Args:
            lifted: the block of the sliced model, in which the streams stand before it.
            teacher: the dense model's.

        Returns:
            The moments; and the activations of every fitted batch, for `write`, where all take at most half of the free
            memory (what the shortcuts carry then stands in the streams), else an empty list: `write` computes them
            again.
        """
        groups, dense_width = lifted.groups, self.config.dense_hidden_size
        joined = JoinedBatches(Moments(groups, dense_width, self.device))
        elements = sum(batch.input_ids.numel() for batch in self.dense_streams.batches) * sum(groups)
        keep = elements * self.dtype.itemsize <= free_memory(self.device) // 2
        kept: list[torch.Tensor | None] = []
        for (index, batch, dense), (_, _, stream) in zip(self.dense_streams, self.streams, strict=False):
            inputs = self.inputs(block, stream, batch)
            with self.stage("teacher"):
                after = self.dense_after(block, teacher, index, batch, dense, inputs)
                self.dense_streams[index] = after
            self.advance(1)
            with self.stage("signals"):
                carried, activations = lifted.activations(stream, **inputs)
                target = objective.target(after, carried)
            with self.stage("refit"):
                self.add_moments(joined, objective, batch, activations, target, dense, after)
            if keep:
                kept.append(activations)
                if carried is not None:
                    self.streams[index] = carried
        with self.stage("refit"):
            return joined.finish(), kept

    def dense_after(
        self,
        block: Block,
        teacher: LiftedBlock,
        index: int,
        batch: TokenBatch,
        dense: torch.Tensor,
        inputs: dict,
    ) -> torch.Tensor:
        """The dense model's stream after a block, of the batch at `index`; `inputs` are those of the sliced one."""

        def forward() -> torch.Tensor:
            own = inputs
            if teacher.dtype != self.dtype:
                own = self.inputs(block, dense.to(teacher.dtype), batch)
            return teacher(dense, **own)

        if self.reuse is None:
            return forward()
        key = "stream", block.index, index, teacher.dtype, self.dtype, self.device
        return self.reuse.stream(key, forward)

    def write(
        self,
        block: Block,
        lifted: LiftedBlock,
        covariance: Covariance | None,
        kept: list[torch.Tensor | None] | None = None,
    ) -> None:
        """Bring every batch past a block with its final output weights, and add it to the next boundary's covariance.

        Args:
            kept: activations of the first batches, as `collect` returns them; they are freed one by one.
        """
        kept = [] if kept is None else kept
        for index, batch, stream in self.streams:
            with self.stage("signals"):
                if index < len(kept):
                    carried, activations = None if lifted.writes_shortcut else stream, kept[index]
                    kept[index] = None
                else:
                    carried, activations = lifted.activations(stream, **self.inputs(block, stream, batch))
                self.streams[index] = out = lifted.write(carried, activations)
            if covariance is not None:
                with self.stage("covariance"):
                    covariance.add(out, batch.attention_mask)
            self.advance(1)

    def collect_dense(
        self, block: Block, dense: LiftedBlock, objective: Objective, moments: Moments | None
    ) -> None:
        """Bring every batch past the dense model's block, and add it to the moments of what it writes."""
        joined = None if moments is None else JoinedBatches(moments)
        for index, batch, stream in self.streams:
            inputs = self.inputs(block, stream.to(dense.dtype), batch)
            carried, activations = dense.activations(stream, **inputs)
            self.streams[index] = out = dense.write(carried, activations)
            if joined is not None:
                target = objective.target(out, carried)
                self.add_moments(joined, objective, batch, activations.to(out.dtype), target, stream, out)
        if joined is not None:
            joined.finish()

    def add_moments(
        self,
        joined: JoinedBatches,
        objective: Objective,
        batch: TokenBatch,
        activations: torch.Tensor,
        target: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
    ) -> None:
        """Add a batch's tokens: what a block writes from, what it has to write, and the dense stream around it."""
        weights = objective.token_weights(before, after, self.config.rms_norm_eps)
        present = None if batch.attention_mask is None else batch.attention_mask.bool()
        joined.add(*(select(states, present) for states in (activations, target, weights)))
