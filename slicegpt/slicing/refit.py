"""Output refit: a block's output weights fitted in closed form to the dense model's stream.

The second of three steps (`slicegpt.slicing.slicer.Slicer.slice_block`): the tokens' moments are collected, the output
weights are fitted to them, and the block writes with these. What is minimised is `slicegpt.slicing.objective`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from slicegpt.families import Linear
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.scratch import spilled
from slicegpt.slicing.blocks import neuron_rows
from slicegpt.slicing.deletion import Deletion
from slicegpt.slicing.heads import group_deletions, groups_that_stay, head_deletions
from slicegpt.slicing.matrices import PANEL_BYTES
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.neurons import neuron_deletions, rounds_to
from slicegpt.slicing.objective import Objective, Writer
from slicegpt.slicing.regression import fit, prior_of

# Of the energy of what a block has to write. A block that nothing was taken from has rounding errors before the fit,
# and no fraction of them.
SMALLEST_ERROR = 1e-9


@dataclass(frozen=True)
class BlockFits:
    """A block's output weights for every λ, and what stays of its parts.

    Attributes:
        writers: of each λ, of each part of the block, its output weights [D, K] and bias, float64, at full width.
        neurons: int64, the MLP neurons that stay, ascending: the columns of the others are 0. None: all.
        groups, heads: int64, the same of attention's key/value groups and of its query heads.
        remaining: of each λ, the fraction of the squared error before the fit that remains; None where there was none.
            Empty where nothing was fitted.
    """

    writers: dict[float, Mapping[str, Linear]]
    neurons: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    remaining: dict[float, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptHeads:
    """How many heads of a block's attention stay.

    Attributes:
        groups: columns of the activations that each key/value group has, see `slicegpt.slicing.blocks.group_rows`.
        head_dim: columns of a query head.
        count: groups that stay.
        of_a_group: query heads that stay in each of these.
    """

    groups: Sequence[slice]
    head_dim: int
    count: int
    of_a_group: int


def fit_block(
    objective: Objective,
    moments: Moments,
    writers: Mapping[str, Linear],
    ridges: Sequence[float],
    neurons: int | None = None,
    scratch: str | os.PathLike | None = None,
    set_aside: Callable[[], None] | None = None,
    heads: KeptHeads | None = None,
) -> BlockFits:
    """Fit a block's output weights to the moments of its tokens, once for every λ.

    Args:
        writers: of each part, in the order of the activations' columns, the output weights [D, K] before the fit.
        ridges: λ; what is deleted is chosen at the first.
        neurons: how many MLP neurons stay; None: all.
        scratch: the folder of what has no room beside the system that is solved; None: that of temporary files.
        set_aside: takes what is not needed for the fit out of the device's memory; called where that is still short
            without the moments.
        heads: which heads stay; None: all.
    """
    prior, kept, staying = prior_of(writers.values()), None, None
    staying_groups, staying_heads = None, None
    before = objective.loss(moments, prior)
    make_room(moments, scratch)
    if set_aside is not None and is_short(moments):
        set_aside()
    if neurons is not None or heads is not None:
        deletion = Deletion(partial(objective.normal_equations, moments, ridges[0], prior))
        if heads is not None:
            exhaust(group_deletions(deletion, heads.groups, heads.count))
            exhaust(head_deletions(deletion, heads.groups, heads.head_dim, heads.of_a_group))
            staying_groups = groups_that_stay(deletion, heads.groups).to(moments.device)
            firsts = deletion.stays[: heads.groups[-1].stop : heads.head_dim]
            staying_heads = firsts.nonzero().squeeze(1)
        if neurons is not None:
            group = neuron_rows(writers)
            exhaust(neuron_deletions(deletion, group, rounds_to(group, neurons)))
            staying = deletion.stays[group].nonzero().squeeze(1)
        kept = deletion.kept()
        del deletion  # H⁻¹
    fitted, remaining = {}, {}
    measurable = before > SMALLEST_ERROR * moments.energy.item()
    for ridge in ridges:
        writer = fit(objective, moments, ridge, prior, kept)
        if ridge != ridges[-1] and is_short(moments):
            writer = replace(writer, weight=spilled(writer.weight, scratch))
        fitted[ridge] = split_parts(writer, writers, moments.groups)
        remaining[ridge] = writer.loss / before if measurable else None
    return BlockFits(fitted, staying, staying_groups, staying_heads, remaining)


def exhaust(steps: Iterable) -> None:
    """Take all steps of an iterator for what they do."""
    deque(steps, maxlen=0)


def is_short(moments: Moments) -> bool:
    """Whether the device lacks the memory for one more system [K, K] with its right-hand side and solution [K, D]."""
    size, width = moments.cross.shape
    return free_memory(moments.device) < 8 * size * (size + 2 * width) + 4 * PANEL_BYTES


def make_room(moments: Moments, scratch: str | os.PathLike | None) -> None:
    """Before a system is solved: beside it, the moments stay on the device only where both have room there."""
    if moments.size and is_short(moments):
        moments.spill(scratch)


def split_parts(fitted: Writer, writers: Mapping[str, Linear], groups: Sequence[int]) -> dict[str, Linear]:
    """What was fitted side by side, as one layer for each of `writers`, of `groups` columns each."""
    weights = fitted.weight.mT.split(groups, dim=1)
    layers = {
        part: Linear(weight, None if writer.bias is None else torch.zeros_like(writer.bias))
        for (part, writer), weight in zip(writers.items(), weights, strict=True)
    }
    if fitted.bias is not None:  # parallel parts: their sum is what counts, and the first takes it
        first = next(part for part, writer in writers.items() if writer.bias is not None)
        layers[first] = Linear(layers[first].weight, fitted.bias)
    return layers
