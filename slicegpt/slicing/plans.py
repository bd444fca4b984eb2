"""Which plan is sliced, of those that reach the size: how wide the network is, and how many neurons and key/value
groups each layer keeps.

Plans are predicted from costs that are taken once (`slicegpt.slicing.allocation`), at every width that is considered;
the best few are measured (`slicegpt.slicing.trials`), and the best of these is taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slicegpt.calibration.batches import CalibrationBatch
from slicegpt.conversion.plan import width_for_slice
from slicegpt.conversion.size_plan import NARROWER
from slicegpt.families import Checkpoint
from slicegpt.modeling import SlicedConfig
from slicegpt.progress import Progress
from slicegpt.recipe import PRICES
from slicegpt.slicing.allocation import (
    Costs,
    deletion_costs,
    fewest_neurons,
    group_structures,
    looked_at,
    neuron_structures,
    share_out,
)
from slicegpt.slicing.exchange import losses_along, rise_at
from slicegpt.slicing.keeping import Keeper
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.prices import priced_windows
from slicegpt.slicing.reuse import Reuse
from slicegpt.slicing.trials import trial
from slicegpt.step_times import StepTimes

logger = logging.getLogger("slicegpt")

# Exponents e of `slicegpt.slicing.exchange`: the geometric mean of price and objective, and the price alone.
EXPONENTS = (0.5, 0.0)

# A plan with fewer columns is measured where its prediction is at most so many times the best one's: the price of a
# width is an upper bound (`slicegpt.slicing.prices`).
NARROWER_WITHIN = 1.5

# The curves go down to this fraction of the neurons at least, so that all sizes share them.
FEWEST_PRICED = 0.125


@dataclass
class Plan:
    """A way to reach the size.

    Attributes:
        config: with the neurons and key/value groups of each layer.
        exponent: of the predicted losses that it is the best by; None: of the objective's rises alone.
        predicted: the sum of these, in nats a token.
        measured: the divergence of its logits from the dense model's, in nats a token; None: not measured.
    """

    config: SlicedConfig
    exponent: float | None = None
    predicted: float | None = None
    measured: float | None = None

    @property
    def counts(self) -> tuple[int, list[int], list[int]]:
        """Columns, and what each layer keeps."""
        return _width(self.config), self.config.neurons, self.config.key_value_heads

    def shape(self, choices: Sequence[SlicedConfig]) -> tuple:
        """Which of `choices` it is of, what its layers keep, and its figures: plain values."""
        widths = [config.boundary_widths for config in choices]
        index, config = widths.index(self.config.boundary_widths), self.config
        return index, config.neurons, config.layer_key_value_heads, self.exponent, self.predicted

    def record(self) -> dict:
        """For `slicing.json`."""
        return {
            "width": max(self.config.boundary_widths[:-1]),
            "neurons": self.config.neurons,
            "kv_groups": self.config.key_value_heads,
            "exponent": self.exponent,
            "predicted": self.predicted,
            "measured": self.measured,
        }


def find_plan(
    checkpoint: Checkpoint,
    choices: Sequence[SlicedConfig],
    batches: Sequence[CalibrationBatch],
    options: SlicingOptions,
    objective: Objective,
    ridge: float,
    progress: Progress,
    keeper: Keeper | None = None,
    reuse: Reuse | None = None,
) -> list[Plan]:
    """The plans that were measured, or the only one; the best one first.

    Args:
        choices: configs of the same size and different widths, each with the same number of neurons in all layers.
        batches: calibration tokens, of which a part is looked at.
        objective, ridge: of the refit, and its λ.
        keeper: keeps what an interrupted run needs to go on, and has what was kept of one.
        reuse: where the costs are kept for other sizes.

    Returns:
        The same on all ranks.
    """
    keeper, multiple = keeper or Keeper(), options.neuron_multiple
    part = looked_at(batches)
    # Layers of experts have no prices: their costs are shared out at the width that was planned.
    priced = options.allocate == PRICES and not choices[0].num_experts
    windows = priced_windows(batches, len(part)) if priced else None
    began = time.perf_counter()
    costs = find_costs(checkpoint, choices, part, windows, options, objective, ridge, progress, keeper, reuse)
    keeper.journal["costs_seconds"] = keeper.journal.get("costs_seconds", 0.0) + time.perf_counter() - began
    shapes = options.ranks.decide(
        lambda: [plan.shape(choices) for plan in predicted_plans(choices, costs, multiple, options.times)]
    )
    plans = [
        Plan(_with_counts(choices[index], neurons, groups), *figures)
        for index, neurons, groups, *figures in shapes
    ]
    if len(plans) == 1:
        return plans

    known = list(keeper.journal.get("trials", []))
    with progress.stage("plans, sliced on a part of the text", len(plans), "plans") as advance:
        for number, plan in enumerate(plans):
            done = options.ranks.decide(lambda number=number: known[number] if number < len(known) else None)
            if done is None:
                began = time.perf_counter()
                done = trial(checkpoint, plan.config, part, windows, costs.dense, options, objective, ridge)
                known.append(done)
                seconds = keeper.journal.get("trials_seconds", 0.0) + time.perf_counter() - began
                keeper.note(trials=list(known), trials_seconds=seconds)
            plan.measured = done
            advance(1)
    losses = options.ranks.decide(lambda: [plan.measured for plan in plans])
    plans = [replace(plan, measured=loss) for plan, loss in zip(plans, losses, strict=True)]
    plans.sort(key=lambda plan: plan.measured)
    logger.info("plans: %s", [plan.record() for plan in plans])
    return plans


def find_costs(
    checkpoint: Checkpoint,
    choices: Sequence[SlicedConfig],
    part: Sequence[CalibrationBatch],
    windows: CalibrationBatch | None,
    options: SlicingOptions,
    objective: Objective,
    ridge: float,
    progress: Progress,
    keeper: Keeper | None = None,
    reuse: Reuse | None = None,
) -> Costs:
    """What plans are predicted from.

    Args:
        part: the calibration tokens that are looked at.
        windows: those that the prices are taken from; None: there are none.

    The others are those of `find_plan`.
    """
    multiple, widths = options.neuron_multiple, ()
    # Of layers with experts and layers without each has its own.
    mixed = choices[0].num_experts > 0
    fewest = None if mixed else min(fewest_neurons(config, multiple) for config in choices)
    if windows is not None:
        whole = choices[0].dense_intermediate_size
        fewest = min(fewest, max(multiple, int(FEWEST_PRICED * whole) // multiple * multiple))
        if len(choices) > 1:  # of all sizes the same
            full = choices[0].dense_hidden_size
            widths = tuple(dict.fromkeys(width_for_slice(full, cut, multiple) for cut in NARROWER))

    def find() -> Costs:
        return deletion_costs(
            checkpoint,
            choices[0],
            part,
            options,
            objective,
            ridge,
            progress,
            keeper,
            fewest,
            windows,
            widths,
        )

    if reuse is None:
        return find()
    # Of the size, they depend on how far the curves go, and on the widths, alone.
    groups = choices[0].layer_key_value_heads
    layers = range(choices[0].num_hidden_layers)
    key = (
        "deletion costs",
        tuple(fewest_neurons(choices[0], multiple, layer) for layer in layers) if mixed else fewest,
        widths,
        options.allocate,
        ridge,
        options.dtype,
        options.device,
        str(groups),
    )
    return reuse.value(key, find)


def predicted_plans(
    choices: Sequence[SlicedConfig], costs: Costs, multiple: int, times: StepTimes | None = None
) -> list[Plan]:
    """The plans that are worth a trial, each of them different.

    By the price and by its geometric mean with the objective the best plan of all widths, and the best one with fewer
    columns where it comes near.

    Args:
        times: of a step, where the size is its duration.
    """
    if costs.prices is None:
        config = choices[0]
        neurons = share_out(neuron_structures(costs.curves, config, multiple, times), config, times)
        return [Plan(_with_counts(config, neurons, config.layer_key_value_heads))]
    found: list[Plan] = []
    for exponent in EXPONENTS:
        ranked = sorted(
            (_exchanged(config, costs, exponent, multiple, times) for config in choices),
            key=lambda plan: plan.predicted,
        )
        best = ranked[0]
        found.append(best)
        others = [plan for plan in ranked if _width(plan.config) < _width(best.config)]
        if exponent == EXPONENTS[0] and others and others[0].predicted <= NARROWER_WITHIN * best.predicted:
            found.append(others[0])
    return [
        plan for number, plan in enumerate(found) if plan.counts not in [p.counts for p in found[:number]]
    ]


def _exchanged(
    config: SlicedConfig, costs: Costs, exponent: float, multiple: int, times: StepTimes | None
) -> Plan:
    """The plan of one width: neurons and key/value groups in one exchange."""
    layers = len(costs.curves)
    curves, prices = list(costs.curves), list(costs.prices.neurons)
    if costs.groups:
        curves, prices = curves + costs.groups, prices + costs.prices.groups
    losses = losses_along(curves, prices, exponent)
    structures = neuron_structures(losses[:layers], config, multiple, times)
    if costs.groups:
        structures += group_structures(losses[layers:], config, times)
    counts = share_out(structures, config, times)
    columns = costs.prices.columns.get(_width(config), 0.0)
    blocks = sum(rise_at(curve, count) for curve, count in zip(losses, counts, strict=True))
    groups = counts[layers:] or config.layer_key_value_heads
    return Plan(_with_counts(config, counts[:layers], groups), exponent, columns + blocks)


def _width(config: SlicedConfig) -> int:
    """Columns that a network of one width keeps."""
    return max(config.boundary_widths[:-1])


def _with_counts(config: SlicedConfig, neurons: list[int], groups: list[int] | None) -> SlicedConfig:
    if groups is not None and min(groups) == config.num_key_value_heads:
        groups = None
    counts = {"layer_neurons": neurons, "layer_key_value_heads": groups}
    return SlicedConfig.from_dict(config.to_dict() | counts)
