"""The calibration tokens on their way through the network: block by block, in the sliced and in the dense model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from slicegpt.blocks import Block, LiftedBlock
from slicegpt.calibration.sampling import CalibrationBatch
from slicegpt.covariance import Covariance
from slicegpt.families import Checkpoint, Linear
from slicegpt.folding import centre
from slicegpt.memory import free_memory
from slicegpt.modeling import SlicedConfig, SlicedModel
from slicegpt.modeling.layers import SlicedRotaryEmbedding
from slicegpt.refit import JoinedBatches, Moments, token_weights
from slicegpt.signals import Signals, TokenBatch


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


def mean_rows(stream: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of each sample of `stream` [batch, tokens, D] over its tokens, float64."""
    if attention_mask is None:
        return stream.double().mean(dim=1)
    return (stream.double() * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)


def opposite_halves(means: torch.Tensor) -> torch.Tensor:
    """Halves of the samples as unlike each other as they come: bool [samples], True in the second one.

    They lie on opposite sides of the median along the first principal component of the samples' mean embeddings
    [samples, D]. Halves drawn at random would be of one kind of text, and judge a fit too kindly.
    """
    centred = means - means.mean(dim=0)
    direction = torch.linalg.svd(centred, full_matrices=False)[2][0]
    second = torch.zeros(len(means), dtype=torch.bool, device=means.device)
    second[(centred @ direction).argsort()[len(means) // 2 :]] = True
    return second


def select(states: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """[batch, tokens, ...] to [n, ...]: the tokens of a mask, all of them (a view) where it is None."""
    return states.flatten(0, 1) if tokens is None else states[tokens]


class Passes:
    """The streams of all calibration tokens at full width, and how they pass a block.

    Args:
        batches: calibration tokens.
        dtype: of the streams.
        device: where blocks run.
        place: where streams are kept, see `Signals`.
        with_teacher: the dense model's stream is carried beside the sliced one.
        halved: a refit gets the moments of two halves of the samples, to judge one by the other; else those of all.
    """

    def __init__(
        self,
        config: SlicedConfig,
        batches: Sequence[CalibrationBatch],
        dtype: torch.dtype,
        device: torch.device,
        place: str,
        with_teacher: bool,
        halved: bool,
    ):
        self.config, self.dtype, self.device = config, dtype, device
        self.halved = halved
        self.signals = Signals(batches, config.dense_hidden_size, dtype, device, place)
        self.teacher = None
        if with_teacher:
            self.teacher = Signals(batches, config.dense_hidden_size, dtype, device, place)
        self.stage = Stopwatch(device)
        self.advance: Callable[[int], None] = lambda steps: None
        with torch.device("meta"):
            self.shell = SlicedModel(config)  # for its masks and rotary positions; its weights are never used
        if self.shell.rotary_emb is not None:
            self.shell.rotary_emb = SlicedRotaryEmbedding(config).to(device)

    def start(self, checkpoint: Checkpoint, covariance: Covariance | None) -> None:
        """Fill the streams before the first block."""
        means = []
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
            if self.teacher is not None:
                self.teacher[index] = stream
            if self.halved:
                means.append(mean_rows(stream, batch.attention_mask))
        if self.halved:
            sizes = [len(batch.input_ids) for batch in self.signals.batches]
            self.second_half = opposite_halves(torch.cat(means)).split(sizes)

    def parts(self, index: int) -> tuple[torch.Tensor | None, ...]:
        """The tokens of a batch that are not padding, bool [batch, tokens]: all, or those of each half of the samples.

        None stands for every token.
        """
        batch = self.signals.batches[index]
        if not self.halved:
            return (None if batch.attention_mask is None else batch.attention_mask.bool(),)
        second = self.second_half[index][:, None].expand_as(batch.input_ids)
        if sum(map(len, self.second_half)) == 1:  # one sample is halved itself
            length = batch.input_ids.shape[1]
            second = (torch.arange(length, device=second.device) >= length // 2)[None]
        present = torch.ones_like(second) if batch.attention_mask is None else batch.attention_mask.bool()
        return present & ~second, present & second

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

    def run_refitted(
        self,
        block: Block,
        lifted: LiftedBlock,
        teacher: LiftedBlock,
        refit: Callable[[Sequence[Moments]], dict[str, Linear]],
        covariance: Covariance | None,
    ) -> None:
        """As `run`, with the output weights that `refit` makes of the moments of the samples, or of their halves.

        Activations are kept from the moments to the output where they take at most half of the free memory;
        otherwise the block computes them twice.
        """
        groups, dense_width = lifted.groups, self.config.dense_hidden_size
        folds = [JoinedBatches(Moments(groups, dense_width, self.device)) for _ in range(1 + self.halved)]
        elements = sum(batch.input_ids.numel() for batch in self.signals.batches) * sum(groups)
        keep = elements * self.dtype.itemsize <= free_memory(self.device) // 2
        kept: list[torch.Tensor | None] = []
        for (index, batch, stream), (_, _, dense) in zip(self.signals, self.teacher, strict=True):
            inputs = self.inputs(block, stream, batch)
            with self.stage("teacher"):
                self.teacher[index] = target = teacher(dense, **inputs)
            self.advance(1)
            with self.stage("signals"):
                carried, activations = lifted.activations(stream, **inputs)
                missing = target if carried is None else target - carried
            with self.stage("refit"):
                weights = token_weights(target, self.config.rms_norm_eps)
                for fold, tokens in zip(folds, self.parts(index), strict=True):
                    fold.add(*(select(states, tokens) for states in (activations, missing, weights)))
            if keep:
                kept.append(activations)
                if carried is not None:
                    self.signals[index] = carried
        with self.stage("refit"):
            lifted.set_writers(refit([fold.finish() for fold in folds]))
        del folds
        for index, batch, stream in self.signals:
            with self.stage("signals"):
                if keep:
                    carried, activations = None if lifted.writes_shortcut else stream, kept[index]
                    kept[index] = None
                else:
                    carried, activations = lifted.activations(stream, **self.inputs(block, stream, batch))
                self.signals[index] = out = lifted.write(carried, activations)
            if covariance is not None:
                with self.stage("covariance"):
                    covariance.add(out, batch.attention_mask)
            self.advance(1)
