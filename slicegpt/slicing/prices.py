"""What the whole model loses when one block gives something up: the Kullback-Leibler divergence of its logits.

The rise of a block's own objective does not tell: an error of the same size costs the logits 25 times as much in one
layer as in another (docs/quality.md). So a few windows of the calibration text that the fits do not see pass the dense
model once, and beside them, in streams of their own, the same windows in networks that differ from it in one block: its
MLP has fewer neurons, or its attention fewer key/value groups, and its output weights are fitted to make up for that.
Such a network is the dense one up to its
block, so its stream begins there, and every layer is read once for all of them. The streams take the place of the
networks: the dense model need never be in memory.

Columns are priced in the same pass, at a few constant widths of the whole network: the stream is projected onto the
leading axes at every boundary. No fit makes up for what is cut off, which would take a run of slicing for every width:
so a width's price is an upper bound, by about a third where both were measured, and a plan with fewer columns that
comes near the others is measured with its fits (`slicegpt.slicing.trials`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.families import Checkpoint
from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.blocks import Block, LiftedBlock
from slicegpt.slicing.divergence import DenseLogits
from slicegpt.slicing.objective import Writer
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.propagation import Propagation
from slicegpt.slicing.streams import TokenBatch, choose_storage, make_store

# Tokens that the prices are taken from, and windows that they are of at least, where the text has so many.
TOKENS, WINDOWS = 768, 4

# Fractions of an MLP's neurons that remain where its price is taken; between them its objective's curve tells.
LEVELS = (0.625, 0.25)

# Fractions of the key/value groups, likewise.
GROUP_LEVELS = (2 / 3, 1 / 3, 0.0)

# Tokens of several networks that pass a block together.
TOGETHER = 4096


@dataclass(frozen=True)
class Cut:
    """What is cut of the dense model.

    Attributes:
        kind: "neurons" or key/value "groups" of one layer, or "columns" of the whole network.
        layer: None for columns.
        count: what remains.
    """

    kind: str
    layer: int | None
    count: int


@dataclass
class PriceList:
    """What cuts cost, in nats a token.

    Attributes:
        neurons: of each layer {remaining neurons: price}.
        groups: of each layer {remaining key/value groups: price}.
        columns: {width: price}.
    """

    neurons: list[dict[int, float]] = field(default_factory=list)
    groups: list[dict[int, float]] = field(default_factory=list)
    columns: dict[int, float] = field(default_factory=dict)


def group_levels(groups: int) -> list[int]:
    """The numbers of key/value groups, of `groups`, at which a layer's price is taken, descending."""
    return sorted({min(groups - 1, round(level * groups)) for level in GROUP_LEVELS}, reverse=True)


def priced_windows(batches: Sequence[CalibrationBatch], seen: int) -> CalibrationBatch:
    """The windows that prices are taken from: the first ones behind the `seen` batches, which are fitted to.

    Where no others are left, of those. Neighbours hold all sources in their proportions. A window is cut to its share
    of `TOKENS`.
    """
    rest = batches[seen:] or batches
    length = max(batch.input_ids.shape[1] for batch in rest)
    wanted = max(WINDOWS, -(-TOKENS // length))
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in rest:
        rows += zip(batch.input_ids, batch.attention_mask, strict=True)
        if len(rows) >= wanted:
            break
    rows = rows[:wanted]
    share = min(-(-TOKENS // len(rows)), max(len(ids) for ids, _ in rows))
    ids, masks = (
        torch.stack([functional.pad(row[:share], (0, max(0, share - len(row)))) for row in part])
        for part in zip(*rows, strict=True)
    )
    return CalibrationBatch(ids, masks)


class _Streams:
    """This rank's streams of the networks that are cut; `Propagation` keeps and restores them by their places."""

    def __init__(self, store):
        self.store = store

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.store.fetch(place)()

    def __setitem__(self, place: int, stream: torch.Tensor) -> None:
        self.store.write(place, stream)


class Prices:
    """The priced windows on their way through the dense model and through the networks that are cut.

    Of several ranks each has a part of these networks, in turn, and all have the dense model's stream.

    Args:
        config: of the dense model, or of a sliced one of it.
        windows: see `priced_windows`.
        most: networks at most, for the choice of their storage.
        widths: of the whole network, that are priced.
        propagation: of the calibration tokens; its snapshots hold the streams as well.

    Attributes:
        cuts: what the networks are, in the order of their streams.
        losses: of each one, once all blocks are passed; None before, and on all ranks but the first.
    """

    def __init__(
        self,
        config: SlicedConfig,
        windows: CalibrationBatch,
        most: int,
        widths: Sequence[int],
        options: SlicingOptions,
        propagation: Propagation,
    ):
        self.config, self.widths, self.propagation = config, sorted(widths, reverse=True), propagation
        self.ranks, self.device, self.dtype = options.ranks, options.device, options.dtype
        mask = None if bool(windows.attention_mask.all()) else windows.attention_mask.to(self.device)
        self.batch = TokenBatch(windows.input_ids.to(self.device), mask)
        own = -(-most // self.ranks.size)
        size = own * windows.input_ids.numel() * config.dense_hidden_size * options.dtype.itemsize
        storage = choose_storage(options.activation_storage, size, self.device, options.scratch)
        self.streams = _Streams(make_store(storage, own, self.device, options.scratch))
        self.cuts: list[Cut] = []
        self.losses: list[float] | None = None
        self.dense: torch.Tensor | None = None
        propagation.include("cuts", self.streams)

    # --- on their way ---

    def start(self, checkpoint: Checkpoint) -> None:
        """The streams before the first block."""
        self.dense = self.propagation.embedded(checkpoint, self.batch)
        for width in self.widths:
            self._begin(Cut("columns", None, width), self.dense)

    def narrow(self, axes: torch.Tensor) -> None:
        """Project what is priced for its columns onto the leading ones of `axes`, a boundary's [D, widest], float64."""
        for place, cut in self._own():
            if cut.kind == "columns":
                basis = axes[:, : cut.count].to(self.dtype)
                self.streams[place] = (self.streams[place] @ basis) @ basis.mT

    def pass_block(self, block: Block, dense: LiftedBlock, fits: Sequence[tuple[Cut, Writer]]) -> None:
        """Bring all of them past a block; with `fits` in the place of its output weights further networks begin.

        Args:
            dense: the dense model's block.
            fits: what is cut of this block, and what writes in its place.
        """
        windows = len(self.batch.input_ids)
        places = [place for place, _ in self._own()]
        at_once = max(1, TOGETHER // self.batch.input_ids.numel())
        for begin in range(0, len(places), at_once):
            group = places[begin : begin + at_once]
            stream = torch.cat([self.streams[place] for place in group])
            for place, out in zip(group, self._passed(block, dense, stream).split(windows), strict=True):
                self.streams[place] = out.clone()
        carried, activations = dense.activations(self.dense, **self._inputs(block, dense, self.dense))
        own = dense.weight, dense.bias
        for cut, writer in fits:
            dense.weight = writer.weight.mT.to(activations.dtype)
            dense.bias = None if writer.bias is None else writer.bias.to(activations.dtype)
            self._begin(cut, dense.write(carried, activations).to(self.dtype))
        dense.weight, dense.bias = own
        self.dense = dense.write(carried, activations)

    def finish(self, checkpoint: Checkpoint) -> None:
        """Compare all of them with the dense model, whose blocks are passed."""
        own = [place for place, _ in self._own()]
        sums = torch.zeros(len(self.cuts), dtype=torch.float64, device=self.device)
        if own:
            dense = self.reference(checkpoint)
            found = dense.divergences(len(own), lambda index: self.streams[own[index]])
            sums[self.ranks.rank :: self.ranks.size] = torch.tensor(found, dtype=torch.float64).to(sums)
        self.ranks.reduce_(sums)
        self.losses = sums.tolist() if self.ranks.first else None

    def reference(self, checkpoint: Checkpoint) -> DenseLogits:
        """What other networks are compared with on these windows."""
        mask = None if self.batch.attention_mask is None else self.batch.attention_mask.bool()
        config = self.config
        return DenseLogits(checkpoint, self.dense, mask, config.rms_norm_eps, config.final_logit_softcapping)

    def prices(self) -> PriceList:
        """What the cuts cost; a divergence is never below 0, but for its rounding."""
        layers = range(self.config.num_hidden_layers)
        found = PriceList([{} for _ in layers], [{} for _ in layers])
        for cut, loss in zip(self.cuts, self.losses, strict=True):
            of = found.columns if cut.layer is None else getattr(found, cut.kind)[cut.layer]
            of[cut.count] = max(0.0, loss)
        return found

    # --- what a snapshot holds ---

    def data(self) -> dict:
        """Plain values."""
        return {"cuts": [[cut.kind, cut.layer, cut.count] for cut in self.cuts], "losses": self.losses}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Beside the streams of `Propagation`."""
        return {} if self.dense is None else {"priced.dense": self.dense}

    def restore(self, data: dict | None, tensors: dict[str, torch.Tensor] | None) -> None:
        """Take up a run that was interrupted, before `Propagation.restore`; of rank 0 alone there is something."""
        cuts, self.losses = self.ranks.decide(lambda: (data["cuts"], data["losses"]))
        for kind, layer, count in cuts:
            self._count(Cut(kind, layer, count))
        self.dense = self.ranks.decide(lambda: tensors["priced.dense"].to(self.device))

    # --- details ---

    def _own(self) -> Iterator[tuple[int, Cut]]:
        """The places of this rank's networks in its store."""
        return enumerate(self.cuts[self.ranks.rank :: self.ranks.size])

    def _count(self, cut: Cut) -> int:
        """Enter a cut; the number of its network."""
        self.cuts.append(cut)
        self.propagation.shapes["cuts"].append(tuple(self.batch.input_ids.shape))
        return len(self.cuts) - 1

    def _begin(self, cut: Cut, stream: torch.Tensor) -> None:
        place, owner = divmod(self._count(cut), self.ranks.size)
        if owner == self.ranks.rank:
            self.streams[place] = stream

    def _passed(self, block: Block, dense: LiftedBlock, stream: torch.Tensor) -> torch.Tensor:
        return dense(stream, **self._inputs(block, dense, stream)).to(self.dtype)

    def _inputs(self, block: Block, dense: LiftedBlock, stream: torch.Tensor) -> dict:
        mask = self.batch.attention_mask
        if mask is not None:
            mask = mask.repeat(len(stream) // len(mask), 1)
        batch = TokenBatch(self.batch.input_ids, mask)
        return self.propagation.inputs(block, stream.to(dense.dtype), batch)
