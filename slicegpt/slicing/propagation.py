"""The calibration tokens on their way through the network: block by block, in the sliced and in the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.folding import centre
from slicegpt.errors import SliceGPTError
from slicegpt.families import Checkpoint
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.scratch import free_space, spilled
from slicegpt.modeling import SlicedConfig, SlicedModel
from slicegpt.modeling.layers import build_rotary
from slicegpt.slicing.blocks import Block, Lifted
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.filed_moments import batch_bytes, moments_for
from slicegpt.slicing.mixture_moments import JoinedMixture, MixtureMoments, mixture_moments
from slicegpt.slicing.mixtures import LiftedMixture, RoutedActivations
from slicegpt.slicing.moments import JoinedBatches, Moments
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.reuse import Reuse
from slicegpt.slicing.streams import Streams, TokenBatch, choose_storage
from slicegpt.slicing.timing import StageTimer


def tokens_of(streams: Streams) -> int:
    """Of all batches, padding included."""
    return sum(batch.input_ids.numel() for batch in streams.batches)


def check_finite(sums: Covariance | Moments | MixtureMoments, block: Block | None) -> None:
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
        options: the dtype of the streams, the device where blocks run, where streams are kept (see `choose_storage`)
            and in which folder those on the disk, and the ranks: the batches are dealt out among them; sums over all
            batches are on rank 0 alone.
        fitted: so many batches, the first ones, are refitted to: the dense model's stream is carried beside theirs.
        reuse: where that stream is kept for other sizes, see `slicegpt.slicing.reuse`.

    Attributes:
        count, fitted: batches, and fitted ones, on all ranks together; tokens: theirs without padding.
        streams: of this rank's batches, in the sliced model.
        dense_streams: of its fitted batches, in the dense model.
        stage: times the stages.
        advance: called after every pass of one batch through one block with their number, on all ranks together.
    """

    def __init__(
        self,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        options: SlicingOptions,
        fitted: int = 0,
        reuse: Reuse | None = None,
    ):
        dtype, device, scratch = options.dtype, options.device, options.scratch
        self.reuse, self.scratch, self.signal = reuse, scratch, options.signal
        self.config, self.dtype, self.device = config, dtype, device
        self.ranks = options.ranks
        self.count, self.fitted = len(batches), fitted
        self.tokens = sum(batch.tokens for batch in batches)
        # Shapes of the ids of all ranks' batches, by which a snapshot has them.
        shapes = [tuple(batch.input_ids.shape) for batch in batches]
        self.shapes = {"streams": shapes, "dense_streams": shapes[:fitted]}
        self.others: dict[str, MutableSequence[torch.Tensor]] = {}
        fitted_batches, batches = self.ranks.deal(batches[:fitted]), self.ranks.deal(batches)
        tokens = sum(batch.input_ids.numel() for batch in [*batches, *fitted_batches])
        stream_bytes = tokens * config.dense_hidden_size * dtype.itemsize
        storage = choose_storage(options.activation_storage, stream_bytes, device, scratch)
        self.streams = Streams(batches, device, storage, scratch)
        self.dense_streams = Streams(fitted_batches, device, storage, scratch)
        self.stage = StageTimer(device)
        self.advance: Callable[[int], None] = lambda steps: None
        with torch.device("meta"):
            self.shell = SlicedModel(config)  # for its masks and rotary positions; its weights are never used
        if self.shell.rotary_emb is not None:
            self.shell.rotary_emb = build_rotary(config).to(device)

    def new_covariance(self) -> Covariance:
        """An empty one of a boundary's stream."""
        width, eps = self.config.dense_hidden_size, self.config.rms_norm_eps
        return Covariance(width, self.signal, eps, self.device)

    def start(self, checkpoint: Checkpoint, covariance: Covariance | None) -> None:
        """Fill the streams before the first block."""
        table = checkpoint.embedding.to(self.device)
        for index, stream in self._embeddings(checkpoint, lambda ids: table[ids]):
            if covariance is not None:
                covariance.add(stream, self.streams.batches[index].attention_mask)
            self.streams[index] = stream
            if index < len(self.dense_streams):
                self.dense_streams[index] = stream
        self.add_up(covariance)

    def start_again(self, checkpoint: Checkpoint, lookup: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Fill the sliced model's streams with what its own table holds; the dense model's stay.

        Args:
            lookup: rows of the table, at full width, of token ids on the device.
        """
        for index, stream in self._embeddings(checkpoint, lookup):
            self.streams[index] = stream

    def _embeddings(
        self, checkpoint: Checkpoint, lookup: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and stream of every batch before the first block."""
        for index, batch in enumerate(self.streams.batches):
            yield index, self._embedded(checkpoint, lookup, batch)

    def embedded(self, checkpoint: Checkpoint, batch: TokenBatch) -> torch.Tensor:
        """The stream of other tokens before the first block."""
        table = checkpoint.embedding.to(self.device)
        return self._embedded(checkpoint, lambda ids: table[ids], batch)

    def _embedded(
        self, checkpoint: Checkpoint, lookup: Callable[[torch.Tensor], torch.Tensor], batch: TokenBatch
    ) -> torch.Tensor:
        stream, positions = lookup(batch.input_ids), checkpoint.positions
        if positions is not None:
            ids = self.shell.default_position_ids(stream, batch.attention_mask, 0)
            stream = stream + positions.to(self.device)[ids + self.config.position_offset]
        if checkpoint.family.mean_subtraction:
            stream = centre(stream, True)
        return stream.to(self.dtype)

    # --- what a snapshot of a run holds of it ---

    def include(self, kind: str, streams: MutableSequence[torch.Tensor]) -> None:
        """Snapshots also hold `streams`, which are dealt out among the ranks like batches: number i is that of place
        `i // size` on rank `i % size`. `shapes[kind]` lists those that there are, as windows and tokens."""
        self.others[kind], self.shapes[kind] = streams, []

    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of all streams: they are numbered by batches, whoever has them."""
        return {f"{kind}.{index}": (self.dtype, shape) for kind, index, shape in self._all()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All streams by name, one at a time; on rank 0, with those of the others, within `gathered`."""
        for kind, index, shape in self._all():
            owner, place = index % self.ranks.size, index // self.ranks.size
            if owner == self.ranks.rank:
                yield f"{kind}.{index}", self._own(kind)[place]
            else:
                self.ranks.decide(lambda request=(kind, place, owner): request)
                yield f"{kind}.{index}", self.ranks.receive(shape, self.dtype, owner)

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        """Within it, rank 0 reads the streams of all ranks (`tensors`), or as many of them as it wants to.

        Yields:
            Whether this is rank 0. The others have given what it asked for when they come here.
        """
        if self.ranks.size == 1:
            yield True
        elif self.ranks.first:
            try:
                yield True
            finally:
                self.ranks.decide(lambda: None)
        else:
            while (wanted := self.ranks.decide(lambda: None)) is not None:
                kind, place, owner = wanted
                if owner == self.ranks.rank:
                    self.ranks.send(self._own(kind)[place], 0)
            yield False

    def restore(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Take the streams from where `tensors` of rank 0 put them, whatever ranks those had; instead of `start`."""
        for kind, index, shape in self._all():
            owner, place = index % self.ranks.size, index // self.ranks.size
            if self.ranks.first:
                stream = tensors[f"{kind}.{index}"].to(self.device)
                if owner:
                    self.ranks.send(stream, owner)
                else:
                    self._own(kind)[place] = stream
            elif owner == self.ranks.rank:
                self._own(kind)[place] = self.ranks.receive(shape, self.dtype, 0)

    def _all(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Kind, number and shape of the streams of all ranks."""
        width = self.config.dense_hidden_size
        for kind, shapes in self.shapes.items():
            for index, shape in enumerate(shapes):
                yield kind, index, (*shape, width)

    def _own(self, kind: str) -> Streams | MutableSequence[torch.Tensor]:
        own = {"streams": self.streams, "dense_streams": self.dense_streams}
        return own[kind] if kind in own else self.others[kind]

    def inputs(self, block: Block, stream: torch.Tensor, batch: TokenBatch) -> dict:
        """Attention mask and positions, as the block's attention takes them."""
        shape = stream.shape[:2]
        positions = torch.arange(shape[1], device=stream.device).expand(shape)
        masks, rotary = self.shell.block_inputs(stream, positions, batch.attention_mask)
        mask = masks[self.config.attention_types[block.layer]]
        return {
            "attention_mask": mask,
            "position_embeddings": rotary[block.layer],
            "position_ids": positions,
        }

    def collect(
        self, block: Block, lifted: Lifted, teacher: Lifted, objective: Objective
    ) -> tuple[Moments | MixtureMoments, list[torch.Tensor | RoutedActivations | None]]:
        """Moments of the fitted batches before a block writes; their dense streams pass the dense block.

        Args:
            lifted: the block of the sliced model, in which the streams stand before it.
            teacher: the dense model's.

        Returns:
            The moments; and the activations of every fitted batch, for `write`, where all take at most half of the free
            memory (of the disk, where the moments are in files), and what the shortcuts carry then stands in the
            streams; else an empty list, and `write` computes them again.
        """
        joined = (moments := self.new_moments(lifted, self.dense_streams)).joined(lifted)
        size = tokens_of(self.dense_streams) * sum(lifted.groups) * self.dtype.itemsize
        # What has no room for the moments has none for the activations while the system is solved.
        filed = moments.spilled
        keep = size <= (free_space(self.scratch) if filed else free_memory(self.device)) // 2
        keep = keep and not (filed and block.sparse)
        kept: list[torch.Tensor | RoutedActivations | None] = []
        for (index, batch, dense), (_, _, stream) in zip(self.dense_streams, self.streams, strict=False):
            inputs = self.inputs(block, stream, batch)
            with self.stage("teacher"):
                after = self.dense_after(block, teacher, index, batch, dense, inputs)
                self.dense_streams[index] = after
            self.advance(self.ranks.stands_for(index, self.fitted))
            with self.stage("signals"):
                carried, activations = lifted.activations(stream, **inputs)
                # Behind a norm a block writes what the dense one does: making up for errors of the stream as well,
                # which the norm would scale along, more than doubled the perplexity (docs/quality.md).
                size = lifted.output_size(activations)
                target = objective.target(after, carried if size is None else dense)
            with self.stage("refit"):
                self.add_moments(joined, objective, batch, activations, target, dense, after, size)
            if keep:
                kept.append(spilled(activations, self.scratch) if filed else activations)
                if carried is not None:
                    self.streams[index] = carried
        with self.stage("refit"):
            joined.finish()
        self.add_up(moments)
        return moments, kept

    def new_moments(self, lifted: Lifted, streams: Streams) -> Moments | MixtureMoments:
        """Moments of what a block writes from, in memory where it has room for them and for passing `streams`."""
        rows = sum(weight.shape[0] for weight in lifted.parts.parameters() if weight.dim() == 2)
        batch = max((batch.input_ids.numel() for batch in streams.batches), default=1)
        inputs, width, item = sum(lifted.groups), self.config.dense_hidden_size, self.dtype.itemsize
        own = inputs - (lifted.groups[-1] if lifted.writes_shortcut else 0)
        if isinstance(lifted, LiftedMixture):
            rows = lifted.rows
        beside = batch_bytes(batch, tokens_of(streams), rows, own, inputs, width, item)
        if isinstance(lifted, LiftedMixture):
            return mixture_moments(lifted, width, beside, self.scratch)
        return moments_for(lifted.groups, width, self.device, beside, self.scratch)

    def dense_after(
        self,
        block: Block,
        teacher: Lifted,
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

    def read(self, block: Block, lifted: Lifted) -> Covariance:
        """Second moments [d, d] of what a block's input weights are multiplied with, the normalised stream."""
        width = lifted.basis.shape[1]
        moments = Covariance(width, "residual", self.config.rms_norm_eps, self.device)
        for index, batch, stream in self.streams:
            with self.stage("quantise"):
                moments.add(lifted.normed(stream), batch.attention_mask)
            self.advance(self.ranks.stands_for(index, self.count))
        self.add_up(moments)
        return moments

    def write(
        self,
        block: Block,
        lifted: Lifted,
        covariance: Covariance | None,
        kept: list[torch.Tensor | RoutedActivations | None] | None = None,
        final: bool = True,
    ) -> None:
        """Bring every batch past a block with its output weights, and add it to the next boundary's covariance.

        Args:
            kept: activations of the first batches, as `collect` returns them; they are freed one by one.
            final: the weights are; else what comes out is only looked at, and the streams and `kept` stay.
        """
        kept = [] if kept is None else kept
        for index, batch, stream in self.streams:
            with self.stage("signals"):
                if index < len(kept):
                    carried, activations = None if lifted.writes_shortcut else stream, kept[index]
                    if final:
                        kept[index] = None
                else:
                    carried, activations = lifted.activations(stream, **self.inputs(block, stream, batch))
                out = lifted.write(carried, activations)
                if final:
                    self.streams[index] = out
            if covariance is not None:
                with self.stage("covariance"):
                    covariance.add(out, batch.attention_mask)
            self.advance(self.ranks.stands_for(index, self.count))
        self.add_up(covariance)

    def collect_dense(
        self,
        block: Block,
        dense: Lifted,
        objective: Objective,
        moments: Moments | MixtureMoments | None,
        covariance: Covariance | None = None,
    ) -> None:
        """Bring every batch past the dense model's block, and add it to the moments of what it writes and to the
        covariance of the stream that comes out."""
        joined = None if moments is None else moments.joined(dense)
        for index, batch, stream in self.streams:
            inputs = self.inputs(block, stream.to(dense.dtype), batch)
            carried, activations = dense.activations(stream, **inputs)
            self.streams[index] = out = dense.write(carried, activations)
            if joined is not None:
                target = objective.target(out, carried)
                size = dense.output_size(activations)
                activations = activations.to(out.dtype)
                self.add_moments(joined, objective, batch, activations, target, stream, out, size)
            if covariance is not None:
                covariance.add(out, batch.attention_mask)
        if joined is not None:
            self.add_up(joined.finish())
        self.add_up(covariance)

    def add_up(self, sums: Covariance | Moments | MixtureMoments | None) -> None:
        """Sums over this rank's batches become those over all, on rank 0; the time includes waiting for the slowest."""
        if sums is not None and self.ranks.size > 1:
            with self.stage("exchange"):
                sums.reduce_(self.ranks)

    def add_moments(
        self,
        joined: JoinedBatches | JoinedMixture,
        objective: Objective,
        batch: TokenBatch,
        activations: torch.Tensor | RoutedActivations,
        target: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        size: torch.Tensor | None = None,
    ) -> None:
        """Add a batch's tokens: what a block writes from, what it has to write, and the dense stream around it.

        `size`: what a norm behind the block divides by, see `Objective.before_norm`.
        """
        weights = objective.token_weights(before, after, self.config.rms_norm_eps)
        if size is not None:
            target, weights = objective.before_norm(target, weights, size)
        present = None if batch.attention_mask is None else batch.attention_mask.bool()
        joined.add_batch(activations, target, weights, present)
