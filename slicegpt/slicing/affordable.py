"""Whether a run fits into the machine, before it begins; and if not, what would make it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from slicegpt.calibration.mixture import HELD_OUT
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.scratch import free_space
from slicegpt.modeling import SlicedConfig
from slicegpt.recipe import AUTO, PRICES, UNIFORM, Recipe
from slicegpt.slicing.budget import (
    GPU_CONTEXT,
    GPU_LIBRARIES,
    IMPORTS,
    TOKENIZER,
    Budget,
    budget_of,
)
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.streams import check_storage
from slicegpt.slicing.workload import Machine, Workload

# An estimate may be wrong by this much: a run is refused only where it would not fit if it took that much less.
TOLERANCE = 0.15

PLACES = {"device": "the GPU's memory", "host": "the host's memory", "disk": "the disk for temporary files"}


def workload_of(
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device | None,
    activation_storage: str = AUTO,
    ranks: int = 1,
    in_memory: bool = False,
    timing: bool = False,
) -> Workload:
    """What a recipe's run does.

    Args:
        dtype: of weights and streams.
        device: where blocks run; None: a GPU that is not here.
        ranks: processes that share the samples.
        in_memory: there is no output folder.
        timing: tokens/s are measured at the end.
    """
    check_storage(activation_storage)
    on_gpu, objective = device is None or device.type == "cuda", Objective()
    teacher = objective.teacher_dtype(dtype, device) if device is not None else dtype
    if device is None and dtype == torch.float32:
        teacher = torch.bfloat16
    return Workload(
        recipe.nsamples,
        recipe.seqlen,
        recipe.batch_size,
        recipe.refit_share if recipe.refit else 0.0,
        dtype,
        teacher,
        ridges=len(objective.ridges) if recipe.refit and recipe.ridge == AUTO else 1,
        windows=HELD_OUT,
        allocate=recipe.allocate != UNIFORM,
        prices=recipe.allocate == PRICES,
        storage=activation_storage,
        ranks=ranks,
        on_gpu=on_gpu,
        in_memory=in_memory,
        own_text="self" in [part.rpartition(":")[0] or part for part in recipe.calibration.split(",")],
        timing=timing,
        rounds=recipe.quantize is not None,
    )


def this_machine(device: torch.device, folder: str | os.PathLike | None = None) -> Machine:
    """What a run that begins now may take here.

    Args:
        folder: of the files on the disk; None: that of temporary files.
    """
    host = free_memory(torch.device("cpu")) + IMPORTS + TOKENIZER
    if device.type != "cuda":
        return Machine(host, host, free_space(folder))
    return Machine(free_memory(device) + GPU_CONTEXT, host + GPU_LIBRARIES, free_space(folder))


def best_budget(config: SlicedConfig, work: Workload, machine: Machine) -> Budget:
    """The budget of a run; where "auto" storage has no room, that of the next storage which has."""
    chosen = budget_of(config, work, machine)
    if work.storage != AUTO or chosen.fits:
        return chosen
    order = ("device", "host", "disk")
    for storage in order[order.index(chosen.storage) + 1 :]:
        other = budget_of(config, replace(work, storage=storage), machine)
        if other.fits:
            return other
    return chosen


def check_affordable(config: SlicedConfig, work: Workload, machine: Machine) -> Budget:
    """`best_budget`, or one line that names what is short and the options that would make the run fit.

    Raises:
        SliceGPTError: the run does not fit, whatever the estimate's error.
    """
    budget = best_budget(config, work, machine)
    limits = vars(machine)
    short = [place for place in limits if budget.peak(place) * (1 - TOLERANCE) > limits[place]]
    if short:
        raise SliceGPTError(f"{shortage(budget, short[0])}; {advice(config, work, machine)}", "memory")
    return budget


def shortage(budget: Budget, place: str) -> str:
    """What is short, and what takes most of it."""
    stage = budget.peak_stage(place)
    parts = sorted(stage.parts.items(), key=lambda part: -part[1].get(place, 0))
    largest = ", ".join(f"{name} {places.get(place, 0) / 1e9:.1f}" for name, places in parts[:3])
    limit = getattr(budget.machine, place)
    return (
        f"the run takes about {budget.peak(place) / 1e9:.1f} GB of {PLACES[place]}, of which {limit / 1e9:.1f} GB are "
        f"free (at most during {stage.name!r}: {largest})"
    )


def advice(config: SlicedConfig, work: Workload, machine: Machine) -> str:
    """The first options, one after the other and then together, with which the run fits."""
    for changed, options in alternatives(work):
        if budget_of(config, changed, machine).fits:
            return f"{' '.join(options)} would make it fit"
    return "no storage, batch size or number of samples makes it fit; take a machine with more memory"


def alternatives(work: Workload) -> Iterator[tuple[Workload, list[str]]]:
    """Cheaper runs, the least different ones first, and the options that ask for them."""
    storages = ["host", "disk"] if work.on_gpu else ["disk"]
    samples = [work.samples // divisor for divisor in (1, 2, 4, 8) if work.samples // divisor]
    for count in samples:
        for size in dict.fromkeys((work.batch_size, 1)):
            for storage in dict.fromkeys((work.storage, *storages)):
                options = [f"--nsamples {count}"] if count != work.samples else []
                options += [f"--batch-size {size}"] if size != work.batch_size else []
                options += [f"--activation-storage {storage}"] if storage != work.storage else []
                if options:
                    yield replace(work, samples=count, batch_size=size, storage=storage), options
