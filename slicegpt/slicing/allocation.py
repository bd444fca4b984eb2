"""What deleting MLP neurons costs in every layer, and how many each one keeps.

With the same number everywhere, the neurons of one layer cost twenty times what those of another do (docs/quality.md).
So the tokens pass the dense model once. They tell, of every layer, by how much the refit's objective rises as its
neurons go (`neurons.deletions`), and, where that is asked for, what the whole model loses at a few points of that curve
(`slicegpt.slicing.prices`). The neurons then go where a parameter is cheapest (`slicegpt.slicing.exchange`), until as
many parameters are gone as with the planned number everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.families import Checkpoint
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.slicing.blocks import blocks_of, dense_block, dense_writers, neuron_rows
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.divergence import DenseLogits
from slicegpt.slicing.eigensolver import leading_eigenvectors
from slicegpt.slicing.exchange import Structure, exchange, rise_at
from slicegpt.slicing.keeping import Keeper, Snapshot
from slicegpt.slicing.neurons import Equations, deletions
from slicegpt.slicing.objective import Objective, Writer
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.prices import LEVELS, Cut, PriceList, Prices
from slicegpt.slicing.propagation import Propagation, check_finite
from slicegpt.slicing.refit import make_room
from slicegpt.slicing.regression import fit, prior_of

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
        prices: what the whole model loses, where it was looked at.
        dense: the dense model's distributions at the tokens that the prices were taken from.
    """

    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    prices: PriceList | None = None
    dense: DenseLogits | None = None


def looked_at(batches: Sequence[CalibrationBatch]) -> Sequence[CalibrationBatch]:
    """The calibration batches that costs are taken from."""
    return batches[: math.ceil(SHARE * len(batches))]


def deletes_neurons(config: SlicedConfig) -> bool:
    return min(config.neurons) < config.dense_intermediate_size


def deletes_heads(config: SlicedConfig) -> bool:
    return min(config.key_value_heads) < config.num_key_value_heads


def fewest_neurons(config: SlicedConfig, multiple: int) -> int:
    """What no layer falls below."""
    fewest = min(FEWEST * config.dense_intermediate_size, config.intermediate_size / 2)
    return min(config.intermediate_size, max(multiple, int(fewest) // multiple * multiple))


def neuron_parameters(config: SlicedConfig) -> list[int]:
    """What a neuron of each layer stores: its rows of the gate and up projections, its column of the down one."""
    reads, own = 2 if config.gated_mlp else 1, int(config.mlp_bias)
    blocks = [block for block in blocks_of(config) if "mlp" in block.parts]
    widths = config.boundary_widths
    return [reads * (widths[block.index] + own) + widths[block.index + 1] for block in blocks]


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
    propagation = Propagation(
        config,
        batches,
        options.dtype,
        options.device,
        options.activation_storage,
        scratch=options.scratch,
        ranks=options.ranks,
    )
    blocks, found_costs = blocks_of(config), Costs()
    fewest = fewest_neurons(config, options.neuron_multiple) if fewest is None else fewest
    priced = None
    if windows is not None:
        most = len(LEVELS) * config.num_hidden_layers + len(widths)
        priced = Prices(config, windows, most, widths, options, propagation)
    keeper = keeper or Keeper()
    found = keeper.found("allocation")
    done = options.ranks.decide(lambda: None if found is None else found.done)
    covariance = _covariance(config, options, widths)
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
        found_costs.curves = [[tuple(point) for point in curve] for curve in found.data["curves"]]
    done = done or 0
    stage = progress.stage("neurons: what deleting them costs", len(blocks), "blocks", done=done)
    with stage as advance:
        for block in blocks[done:]:
            layer = checkpoint.layer(block.layer)
            writers = dense_writers(config, block, layer, options.device)
            lifted = dense_block(config, block, layer, writers, dtype, options.device)
            moments, fits = None, []
            if "mlp" in block.parts:
                moments = propagation.new_moments(lifted, propagation.streams)
            ends = block is blocks[-1]
            covariance = None if ends else _covariance(config, options, widths)
            propagation.collect_dense(block, lifted, objective, moments, covariance)
            del layer  # the output weights are all that the costs need of it
            if priced is None:
                del lifted
            if moments is not None and options.ranks.first:
                check_finite(moments, block)
                make_room(moments, options.scratch)
                prior = prior_of(writers.values())
                equations = partial(objective.normal_equations, moments, ridge, prior)
                levels = () if priced is None else LEVELS
                curve, kept = cost_curve(equations, neuron_rows(writers), fewest, levels)
                found_costs.curves.append(curve)
                for count, rows in kept.items():
                    found_fit = fit(objective, moments, ridge, prior, rows)
                    writer = Writer(found_fit.weight.to(options.dtype), found_fit.bias)
                    fits.append((Cut("neurons", block.layer, count), writer))
            data, tensors = {"curves": found_costs.curves}, {}
            if priced is not None:
                priced.pass_block(block, lifted, options.ranks.decide(lambda fits=fits: fits))
                del lifted
                if ends:
                    priced.finish(checkpoint)
                else:
                    _narrow(priced, covariance, options)
                data, tensors = data | priced.data(), priced.tensors()
            with propagation.gathered() as first:
                if first:
                    streams = None if ends else propagation
                    keeper.keep(Snapshot("allocation", block.index + 1, data, tensors, streams))
            del writers, moments, fits  # one layer's at a time
            advance(1)
    if priced is not None and options.ranks.first:
        found_costs.prices, found_costs.dense = priced.prices(), priced.reference(checkpoint)
    return found_costs


def _covariance(config: SlicedConfig, options: SlicingOptions, widths: Sequence[int]) -> Covariance | None:
    if not widths:
        return None
    return Covariance(config.dense_hidden_size, options.signal, config.rms_norm_eps, options.device)


def _narrow(priced: Prices, covariance: Covariance | None, options: SlicingOptions) -> None:
    """Project what is priced for its columns onto a boundary's leading axes."""
    if covariance is None:
        return
    widest = max(priced.widths)
    priced.narrow(options.ranks.decide(lambda: leading_eigenvectors(covariance.matrix, widest)[1]))


def cost_curve(
    equations: Equations, group: slice, fewest: int, levels: Sequence[float] = ()
) -> tuple[list[tuple[int, float]], dict[int, torch.Tensor]]:
    """The curve of one layer down to `fewest` neurons; the others as `choose_neurons` takes them.

    Args:
        levels: fractions of the neurons; the rows that stay are wanted at the points of the curve next to them.

    Returns:
        `[(remaining neurons, rise of the objective so far)]`, and {remaining neurons: rows that stay, int64}.
    """
    whole = group.stop - group.start
    removable = whole - fewest
    step = max(1, -(-removable // POINTS))
    rounds = [min(step, removable - gone) for gone in range(0, removable, step)]
    points = [whole - gone for gone in accumulate(rounds)]
    wanted = {min(points, key=lambda count: abs(count - level * whole)) for level in levels if points}
    remaining, rise, curve, kept = whole, 0.0, [(whole, 0.0)], {}
    for removed, (rows, more) in zip(rounds, deletions(equations, group, rounds), strict=True):
        remaining, rise = remaining - removed, rise + more.item()
        curve.append((remaining, rise))
        if remaining in wanted:
            kept[remaining] = rows
    return curve, kept


def neuron_structures(
    curves: Sequence[Sequence[tuple[int, float]]], config: SlicedConfig, multiple: int
) -> list[Structure]:
    """What the MLPs of a network of `config`'s widths can give up, in multiples of `multiple`.

    Args:
        curves: of each layer the loss along its neurons, down to `fewest_neurons` at most.
    """
    whole, fewest = config.dense_intermediate_size, fewest_neurons(config, multiple)
    counts = [whole, *range((whole - 1) // multiple * multiple, fewest - 1, -multiple)]
    return [
        Structure(counts, [rise_at(curve, count) for count in counts], parameters)
        for curve, parameters in zip(curves, neuron_parameters(config), strict=True)
    ]


def share_out(structures: Sequence[Structure], config: SlicedConfig) -> list[int]:
    """Neurons of each layer: as many parameters as `config` stores, at the least loss of all layers together."""
    gone = config.dense_intermediate_size - config.intermediate_size
    chosen = exchange(structures, gone * sum(neuron_parameters(config)))
    return [structure.counts[choice] for structure, choice in zip(structures, chosen, strict=True)]
