"""How many MLP neurons each layer keeps: fewer where deleting them costs the stream less.

With the same number everywhere, the neurons of one layer cost twenty times what those of another do (docs/quality.md).
So the dense model's own activations tell, of every layer, by how much the refit's objective rises as its neurons go
(`neurons.deletions`; a layer's errors count alike, whatever its depth), and they go where a parameter is
cheapest, until as many parameters are gone as with the planned number everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.families import Checkpoint
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
from slicegpt.slicing.keeping import Keeper, Snapshot
from slicegpt.slicing.neurons import Equations, deletions
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.propagation import Propagation, check_finite
from slicegpt.slicing.refit import make_room
from slicegpt.slicing.regression import prior_of
from slicegpt.slicing.reuse import Reuse

# The share of the calibration batches that the costs are taken from. They only decide between layers, where they
# differ by factors.
SHARE = 0.25

# The costs of a layer are looked at as long as this fraction of its neurons remains, or half of the planned number.
FEWEST = 0.25

# Points of a layer's curve of costs.
POINTS = 24


def allocate_neurons(
    checkpoint: Checkpoint,
    config: SlicedConfig,
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    objective: Objective,
    ridge: float,
    progress: Progress,
    keeper: Keeper | None = None,
    reuse: Reuse | None = None,
) -> SlicedConfig:
    """`config` with the neurons of its layers shared out anew, in multiples of `options.neuron_multiple`.

    It stores at most as many parameters as `config`, whose layers have the same number of neurons.

    Args:
        batches: calibration tokens; the first ones are looked at, `SHARE` of them.
        objective, ridge: of the refit, and its λ, whose rise the costs are.
        keeper: keeps what an interrupted run needs to go on, and has what was kept of one.
        reuse: where the costs are kept for other sizes.
    """
    looked_at = batches[: math.ceil(SHARE * len(batches))]
    keeper = keeper or Keeper()

    def costs() -> list[list[tuple[int, float]]]:
        return deletion_costs(checkpoint, config, looked_at, options, objective, ridge, progress, keeper)

    if reuse is None:
        curves = costs()
    else:  # of the size, they depend on how far the curves go alone
        fewest = fewest_neurons(config, options.neuron_multiple)
        curves = reuse.value(("deletion costs", fewest, ridge, options.dtype, options.device), costs)
    neurons = options.ranks.decide(
        lambda: share_out_neurons(curves, neuron_parameters(config), config, options.neuron_multiple)
    )
    return SlicedConfig.from_dict(config.to_dict() | {"layer_neurons": neurons})


def deletes_neurons(config: SlicedConfig) -> bool:
    return min(config.neurons) < config.dense_intermediate_size


def deletes_heads(config: SlicedConfig) -> bool:
    return min(config.attention_heads) < config.num_attention_heads


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
) -> list[list[tuple[int, float]]]:
    """Of each layer `[(remaining neurons, rise of the refit's objective so far)]`, from all to `fewest_neurons`.

    Of several ranks the first alone has them.
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
    blocks, curves = blocks_of(config), []
    keeper = keeper or Keeper()
    found = keeper.found("allocation")
    done = options.ranks.decide(lambda: None if found is None else found.done)
    if done is None:
        propagation.start(checkpoint, None)
    elif done < len(blocks):
        propagation.restore(found and found.tensors)
    if found is not None:
        curves = [[tuple(point) for point in curve] for curve in found.data["curves"]]
    done = done or 0
    stage = progress.stage("neurons: what deleting them costs", len(blocks), "blocks", done=done)
    with stage as advance:
        for block in blocks[done:]:
            layer = checkpoint.layer(block.layer)
            writers = dense_writers(config, block, layer, options.device)
            lifted = dense_block(config, block, layer, writers, dtype, options.device)
            moments = None
            if "mlp" in block.parts:
                moments = propagation.new_moments(lifted, propagation.streams)
            propagation.collect_dense(block, lifted, objective, moments)
            writers = scaled_writers(writers, fitted_scale(block, layer, options.device))
            del layer, lifted  # the output weights are all that the costs need of it
            if moments is not None and options.ranks.first:
                check_finite(moments, block)
                make_room(moments, options.scratch)
                equations = partial(objective.normal_equations, moments, ridge, prior_of(writers.values()))
                fewest = fewest_neurons(config, options.neuron_multiple)
                curves.append(cost_curve(equations, neuron_rows(writers), fewest))
            ends = block is blocks[-1]
            data = {"curves": curves}
            with propagation.gathered() as first:
                if first:
                    streams = None if ends else propagation
                    keeper.keep(Snapshot("allocation", block.index + 1, data, propagation=streams))
            del writers, moments  # one layer's at a time
            advance(1)
    return curves


def cost_curve(equations: Equations, group: slice, fewest: int) -> list[tuple[int, float]]:
    """The curve of one layer down to `fewest` neurons; the others as `choose_neurons` takes them."""
    whole = group.stop - group.start
    removable = whole - fewest
    step = max(1, -(-removable // POINTS))
    rounds = [min(step, removable - gone) for gone in range(0, removable, step)]
    remaining, rise, curve = whole, 0.0, [(whole, 0.0)]
    for removed, (_, more) in zip(rounds, deletions(equations, group, rounds), strict=True):
        remaining, rise = remaining - removed, rise + more.item()
        curve.append((remaining, rise))
    return curve


def share_out_neurons(
    curves: Sequence[Sequence[tuple[int, float]]],
    parameters: Sequence[int],
    config: SlicedConfig,
    multiple: int,
) -> list[int]:
    """Neurons of each layer: as `config` stores, at the least rise of all objectives together.

    Along a curve the rise of a neuron only grows (what it does not is noise, and smoothed away), so that taking the
    cheapest step of all, again and again, is best.

    Args:
        curves: of each layer, see `deletion_costs`.
        parameters: what a neuron of each layer stores.
    """
    whole, fewest = config.dense_intermediate_size, fewest_neurons(config, multiple)
    choices = [whole, *range((whole - 1) // multiple * multiple, fewest - 1, -multiple)]
    steps = []
    for layer, curve in enumerate(curves):
        highest = 0.0
        for order, (more, less) in enumerate(pairwise(choices)):
            cost = (_rise_at(curve, less) - _rise_at(curve, more)) / ((more - less) * parameters[layer])
            highest = max(highest, cost)
            steps.append((highest, order, layer, less))
    neurons = [whole] * len(curves)
    excess = (whole - config.intermediate_size) * sum(parameters)
    for _, _, layer, less in sorted(steps):
        if excess <= 0:
            break
        excess -= (neurons[layer] - less) * parameters[layer]
        neurons[layer] = less
    return neurons


def _rise_at(curve: Sequence[tuple[int, float]], remaining: int) -> float:
    """The curve at `remaining` neurons, linear between its points."""
    for (more, lower), (less, higher) in pairwise(curve):
        if less <= remaining <= more:
            return lower + (higher - lower) * (more - remaining) / (more - less)
    raise ValueError(f"remaining must lie in [{curve[-1][0]}, {curve[0][0]}], got {remaining}")
