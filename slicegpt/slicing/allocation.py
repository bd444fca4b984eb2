"""What deleting MLP neurons and key/value groups costs in every layer, and how many each one keeps.

With the same number everywhere, the neurons of one layer cost twenty times what those of another do (docs/quality.md).
So the tokens pass the dense model once. They tell, of every layer, by how much the refit's objective rises as its
neurons go (`neurons.deletions`), and, where that is asked for, what the whole model loses at a few points of that curve
(`slicegpt.slicing.prices`); and both for its key/value groups as well. They then go where a parameter is cheapest
(`slicegpt.slicing.exchange`), until as many parameters are gone as with the planned number of neurons everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.families import Checkpoint, Linear
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.slicing.blocks import (
    blocks_of,
    dense_block,
    dense_writers,
    fitted_scale,
    neuron_rows,
    scaled_writers,
)
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.divergence import DenseLogits
from slicegpt.slicing.eigensolver import leading_eigenvectors
from slicegpt.slicing.exchange import Curve, Structure, exchange, rise_at
from slicegpt.slicing.keeping import Keeper, Snapshot
from slicegpt.slicing.levels import levels
from slicegpt.slicing.mixture_moments import MixtureMoments
from slicegpt.slicing.mixture_refit import mixture_equations
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.neurons import Equations, deletions
from slicegpt.slicing.objective import Objective, Writer
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.prices import GROUP_LEVELS, LEVELS, Cut, PriceList, Prices, group_levels
from slicegpt.slicing.propagation import Propagation, check_finite
from slicegpt.slicing.refit import make_room
from slicegpt.slicing.regression import fit, prior_of
from slicegpt.step_times import StepTimes

# The share of the calibration batches that the costs are taken from. They only decide between layers, where they
# differ by factors.
SHARE = 0.25

# The costs of a layer are looked at as long as this fraction of its neurons remains, or half of the planned number.
FEWEST = 0.25

# Points of a layer's curve of costs.
POINTS = 24


@dataclass
class Costs:
    """What deleting neurons costs.

    Attributes:
        curves: of each layer `[(remaining neurons, rise of the refit's objective so far)]`, from all on.
        groups: the same of key/value groups, from all of them to none; empty where they were not looked at.
        prices: what the whole model loses, where it was looked at.
        dense: the dense model's distributions at the tokens that the prices were taken from.
    """

    curves: list[Curve] = field(default_factory=list)
    groups: list[Curve] = field(default_factory=list)
    prices: PriceList | None = None
    dense: DenseLogits | None = None


def looked_at(batches: Sequence[CalibrationBatch]) -> Sequence[CalibrationBatch]:
    """The calibration batches that costs are taken from."""
    return batches[: math.ceil(SHARE * len(batches))]


def deletes_neurons(config: SlicedConfig) -> bool:
    return config.neurons != config.dense_neurons


def deletes_heads(config: SlicedConfig) -> bool:
    return min(config.attention_heads) < config.num_attention_heads


def fewest_neurons(config: SlicedConfig, multiple: int, layer: int = 0) -> int:
    """What a layer of a plan with equal layers does not fall below."""
    planned = config.neurons[layer]
    fewest = min(FEWEST * config.dense_neurons[layer], planned / 2)
    return min(planned, max(multiple, int(fewest) // multiple * multiple))


def gives_groups(config: SlicedConfig) -> bool:
    """Whether a plan may delete key/value groups: nobody has said how many stay, no norm is over all of them, and they
    have no latent in common."""
    whole = (config.qk_norm and config.qk_norm_whole) or config.kv_lora_rank is not None
    return config.keeps_all_heads and not whole


def group_parameters(config: SlicedConfig) -> list[int]:
    """What a key/value group of each layer stores: rows of the query, key and value projections, columns of the output
    one; less its share of the constant that stays where all of them go."""
    query = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    rows, own = query + 2 * config.head_dim, int(config.attention_bias)
    found = []
    for block in blocks_of(config):
        if "attention" in block.dense_parts:
            before, after = config.boundary_widths[block.index : block.index + 2]
            constant = -(-after // config.num_key_value_heads)
            found.append(rows * (before + own) + query * after - constant)
    return found


def neuron_parameters(config: SlicedConfig) -> list[int]:
    """What a neuron of each layer stores: its rows of the gate and up projections, its column of the down one; where
    there are experts, one neuron of each of them."""
    reads, widths, stored = 2 if config.gated_mlp else 1, config.boundary_widths, []
    for block in blocks_of(config):
        if "mlp" in block.dense_parts:
            copies, bias = (config.num_experts, config.expert_bias) if block.sparse else (1, config.mlp_bias)
            one = reads * (widths[block.index] + int(bias)) + widths[block.index + 1]
            stored.append(copies * one)
    return stored


@torch.no_grad()
def deletion_costs(
    checkpoint: Checkpoint,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    objective: Objective,
    ridge: float,
    progress: Progress,
    keeper: Keeper | None = None,
    fewest: int | None = None,
    windows: CalibrationBatch | None = None,
    widths: Sequence[int] = (),
) -> Costs:
    """What deleting neurons costs in every layer, in one pass through the dense model.

    Args:
        batches: calibration tokens that are looked at.
        fewest: neurons that the curves end at; None: `fewest_neurons`.
        windows: of tokens from which the logits' loss is taken as well, see `slicegpt.slicing.prices`; None: it is not.
        widths: of the whole network, that are priced by them.

    Returns:
        The costs; of several ranks the first alone has them.
    """
    dtype = objective.teacher_dtype(options.dtype, options.device)
    propagation = Propagation(config, batches, options)
    blocks, found_costs = blocks_of(config), Costs()
    priced = None
    if windows is not None:
        most = (len(LEVELS) + len(GROUP_LEVELS)) * config.num_hidden_layers + len(widths)
        priced = Prices(config, windows, most, widths, options, propagation)
    keeper = keeper or Keeper()
    found = keeper.found("allocation")
    done = options.ranks.decide(lambda: None if found is None else found.done)
    covariance = propagation.new_covariance() if widths else None
    if done is None:
        propagation.start(checkpoint, covariance)
        if priced is not None:
            priced.start(checkpoint)
            _narrow(priced, covariance, options)
    else:
        if priced is not None:
            priced.restore(found and found.data, found and found.tensors)
        if done < len(blocks):
            propagation.restore(found and found.tensors)
    if found is not None:
        for name in ("curves", "groups"):
            setattr(found_costs, name, [[tuple(point) for point in curve] for curve in found.data[name]])
    done = done or 0
    stage = progress.stage("neurons: what deleting them costs", len(blocks), "blocks", done=done)
    with stage as advance:
        for block in blocks[done:]:
            layer = checkpoint.layer(block.layer)
            writers = dense_writers(config, block, layer, options.device)
            lifted = dense_block(config, block, layer, writers, dtype, options.device)
            moments, fits = None, []
            has_groups = "attention" in block.dense_parts and priced is not None and gives_groups(config)
            # What attention without any group leaves is a constant, which a norm behind it would not let through.
            has_groups = has_groups and lifted.output_norm is None
            if "mlp" in block.dense_parts or has_groups:
                moments = propagation.new_moments(lifted, propagation.streams)
            ends = block is blocks[-1]
            covariance = None if ends or not widths else propagation.new_covariance()
            propagation.collect_dense(block, lifted, objective, moments, covariance)
            scale = fitted_scale(block, layer, options.device)
            writers = scaled_writers(writers, scale)
            del layer  # the output weights are all that the costs need of it
            if priced is None:
                del lifted
            if moments is not None and options.ranks.first:
                check_finite(moments, block)
                if not block.sparse:  # experts' moments are made room for one by one
                    make_room(moments, options.scratch)
                floor = (
                    fewest_neurons(config, options.neuron_multiple, block.layer) if fewest is None else fewest
                )
                kept = {}
                if block.sparse:
                    curve = mixture_curve(objective, moments, writers, ridge, floor, options.scratch)
                    found_costs.curves.append(curve)
                elif "mlp" in block.dense_parts:
                    wanted = () if priced is None else LEVELS
                    curve, kept = _neuron_costs(objective, moments, ridge, writers, floor, wanted)
                    found_costs.curves.append(curve)
                    fits += [(Cut("neurons", block.layer, count), fitted) for count, fitted in kept.items()]
                if has_groups:
                    curve, kept = _group_costs(config, objective, moments, ridge, writers)
                    found_costs.groups.append(curve)
                    fits += [(Cut("groups", block.layer, count), fitted) for count, fitted in kept.items()]
                fits = [(cut, _unscaled(fitted, scale, options.dtype)) for cut, fitted in fits]
                del kept
            if priced is not None:
                priced.pass_block(block, lifted, options.ranks.decide(lambda fits=fits: fits))
                del lifted
            del writers, moments, fits  # one layer's at a time
            data, tensors = {"curves": found_costs.curves, "groups": found_costs.groups}, {}
            if priced is not None:
                if ends:
                    priced.finish(checkpoint)
                else:
                    _narrow(priced, covariance, options)
                data, tensors = data | priced.data(), priced.tensors()
            with propagation.gathered() as first:
                if first:
                    streams = None if ends else propagation
                    keeper.keep(Snapshot("allocation", block.index + 1, data, tensors, streams))
            advance(1)
    if priced is not None and options.ranks.first:
        found_costs.prices, found_costs.dense = priced.prices(), priced.reference(checkpoint)
    return found_costs


def _unscaled(fitted: Writer, scale: torch.Tensor | None, dtype: torch.dtype) -> Writer:
    """A fit as the block writes with it, its weight in `dtype`; `scale`: see `scaled_writers`."""
    if scale is None:
        return Writer(fitted.weight.to(dtype), fitted.bias)
    return Writer((fitted.weight / scale).to(dtype), None if fitted.bias is None else fitted.bias / scale)


def _neuron_costs(
    objective: Objective,
    moments: Moments,
    ridge: float,
    writers: Mapping[str, Linear],
    fewest: int,
    wanted: Sequence[float],
) -> tuple[Curve, dict[int, Writer]]:
    """`cost_curve` of a block's neurons, and the fits at the points next to the fractions `wanted`."""
    prior = prior_of(writers.values())
    equations = partial(objective.normal_equations, moments, ridge, prior)
    curve, kept = cost_curve(equations, neuron_rows(writers), fewest, wanted)
    return curve, {count: fit(objective, moments, ridge, prior, rows) for count, rows in kept.items()}


def _group_costs(
    config: SlicedConfig,
    objective: Objective,
    moments: Moments,
    ridge: float,
    writers: Mapping[str, Linear],
) -> tuple[Curve, dict[int, Writer]]:
    """The same of its key/value groups, from all of them to none, and the fits at `group_levels`."""
    groups = config.num_key_value_heads
    wanted, curve, kept = group_levels(groups), [], {}
    for level in levels(config, objective, moments, writers, ridge, "attention", range(groups, -1, -1)):
        curve.append((level.count, level.rise))
        if level.count in wanted:
            kept[level.count] = level.writer
    return curve, kept


def _narrow(priced: Prices, covariance: Covariance | None, options: SlicingOptions) -> None:
    """Project what is priced for its columns onto a boundary's leading axes."""
    if covariance is None:
        return
    widest = max(priced.widths)
    priced.narrow(options.ranks.decide(lambda: leading_eigenvectors(covariance.matrix, widest)[1]))


def cost_curve(
    equations: Equations, group: slice, fewest: int, wanted: Sequence[float] = ()
) -> tuple[Curve, dict[int, torch.Tensor]]:
    """The curve of one layer down to `fewest` neurons; the others as `choose_neurons` takes them.

    Args:
        wanted: fractions of the neurons; the rows that stay are asked for at the points of the curve next to them.

    Returns:
        `[(remaining neurons, rise of the objective so far)]`, and {remaining neurons: rows that stay, int64}.
    """
    whole = group.stop - group.start
    removable = whole - fewest
    step = max(1, -(-removable // POINTS))
    rounds = [min(step, removable - gone) for gone in range(0, removable, step)]
    points = [whole - gone for gone in accumulate(rounds)]
    nearest = {min(points, key=lambda count: abs(count - part * whole)) for part in wanted if points}
    remaining, rise, curve, kept = whole, 0.0, [(whole, 0.0)], {}
    for removed, (rows, more) in zip(rounds, deletions(equations, group, rounds), strict=True):
        remaining, rise = remaining - removed, rise + more.item()
        curve.append((remaining, rise))
        if remaining in nearest:
            kept[remaining] = rows
    return curve, kept


def mixture_curve(
    objective: Objective,
    moments: MixtureMoments,
    writers: Mapping[str, Linear],
    ridge: float,
    fewest: int,
    scratch: str | os.PathLike | None,
) -> Curve:
    """The curve of a layer of experts, each of which has the same number of neurons: the sum of theirs."""
    curves = []
    for name, equations in mixture_equations(objective, moments, writers, ridge).items():
        make_room(moments.parts[name], scratch)
        curve, _ = cost_curve(equations, slice(0, moments.parts[name].size), fewest)
        curves.append(curve)
    return [(points[0][0], sum(rise for _, rise in points)) for points in zip(*curves, strict=True)]


def neuron_structures(
    curves: Sequence[Sequence[tuple[int, float]]],
    config: SlicedConfig,
    multiple: int,
    times: StepTimes | None = None,
) -> list[Structure]:
    """What the MLPs of a network of `config`'s widths can give up, in multiples of `multiple`.

    Args:
        curves: of each layer the loss along its neurons, down to `fewest_neurons` at most.
        times: what counts are the seconds of a decoding step; None: parameters.
    """
    structures, rate = [], 1 if times is None else times.mlp
    for layer, (curve, parameters) in enumerate(zip(curves, neuron_parameters(config), strict=True)):
        whole, fewest = config.dense_neurons[layer], fewest_neurons(config, multiple, layer)
        counts = [whole, *range((whole - 1) // multiple * multiple, fewest - 1, -multiple)]
        structures.append(Structure(counts, [rise_at(curve, count) for count in counts], rate * parameters))
    return structures


def group_structures(
    curves: Sequence[Sequence[tuple[int, float]]], config: SlicedConfig, times: StepTimes | None = None
) -> list[Structure]:
    """What the attention of a network of `config`'s widths can give up.

    All of a layer's groups can go where the width stays whole: elsewhere the basis before a block that is gone would
    have to be that behind it. The first layer keeps one, for one layer has to.

    Args:
        curves: of each layer the loss along its key/value groups.
        times: as of `neuron_structures`.
    """
    rate = 1 if times is None else times.attention
    whole = config.num_key_value_heads
    full_width = set(config.shortcuts) == {"identity"}
    structures = []
    for layer, (curve, parameters) in enumerate(zip(curves, group_parameters(config), strict=True)):
        counts = list(range(whole, -1 if full_width and layer else 0, -1))
        structures.append(Structure(counts, [rise_at(curve, count) for count in counts], rate * parameters))
    return structures


def share_out(
    structures: Sequence[Structure], config: SlicedConfig, times: StepTimes | None = None
) -> list[int]:
    """What remains of each structure, so that as many parameters are stored as `config` does, or its step takes as
    long, at the least loss of all together.

    Args:
        times: as of `neuron_structures`.
    """
    rate = 1 if times is None else times.mlp
    gone = [whole - left for whole, left in zip(config.dense_neurons, config.neurons, strict=True)]
    sizes = zip(gone, neuron_parameters(config), strict=True)
    chosen = exchange(structures, sum(count * rate * size for count, size in sizes))
    return [structure.counts[choice] for structure, choice in zip(structures, chosen, strict=True)]
