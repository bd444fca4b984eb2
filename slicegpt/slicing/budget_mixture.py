"""The memory of the blocks that are mixtures of experts, see `slicegpt.slicing.budget`."""

from __future__ import annotations

import math
from typing import Protocol

from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.allocation import SHARE
from slicegpt.slicing.blocks import Block
from slicegpt.slicing.filed_moments import batch_bytes, needs_files
from slicegpt.slicing.planned import PlannedStage
from slicegpt.slicing.workload import Workload

F64 = 8


class PlannedRun(Protocol):
    """What `slicegpt.slicing.budget` knows of the run; `device` and `host` are one place on a CPU.

    Attributes:
        width: D; item: bytes of a number of the run's dtype.
        device: the name of the place where blocks run.
        centred: the family subtracts means.
    """

    config: SlicedConfig
    work: Workload
    width: int
    item: int
    device: str
    centred: bool

    def stage(self, name: str, streams: float = 1.0) -> PlannedStage:
        """A stage with what is there all along."""

    def free(self, stage: PlannedStage) -> float:
        """Bytes of the device's memory beside a stage."""


def columns(model: PlannedRun) -> int:
    """Columns of all output layers of a mixture."""
    config = model.config
    return config.num_experts * config.dense_moe_intermediate_size + config.shared_expert_intermediate_size


def writers(model: PlannedRun) -> int:
    """Elements of all output layers of a mixture."""
    return columns(model) * model.width


def _moments(model: PlannedRun) -> int:
    config, width = model.config, model.width
    neurons, shared = config.dense_moe_intermediate_size, config.shared_expert_intermediate_size
    own = config.num_experts * neurons * (neurons + width) + shared * (shared + width)
    return F64 * own


def _largest(model: PlannedRun) -> int:
    """Neurons of the largest of the experts, which is solved by itself."""
    return max(model.config.dense_moe_intermediate_size, model.config.shared_expert_intermediate_size)


def _a_token(model: PlannedRun) -> tuple[int, int]:
    """Rows of the input layers that a token meets, and columns of the output layers."""
    config = model.config
    own = config.num_experts_per_tok * config.dense_moe_intermediate_size
    own += config.shared_expert_intermediate_size
    return 2 * own + config.num_experts, own


def _batch(model: PlannedRun, fitted_tokens: int) -> int:
    rows, own = _a_token(model)
    work = model.work
    # Every expert that writes for a token has a row at full width.
    rows += 3 * model.config.num_experts_per_tok * model.width
    item = work.dtype.itemsize
    return batch_bytes(work.batch_tokens, fitted_tokens, rows, own, own, model.width, item)


def _collected(model: PlannedRun, stage: PlannedStage, passing: int) -> bool:
    """The moments while tokens are added, and whether they are in files."""
    size = _moments(model)
    filed = not model.work.on_gpu and needs_files(1, 0, size + passing, model.free(stage))
    stage.add("moments", size, "disk" if filed else model.device)
    stage.add("batch", passing, model.device)
    return filed


def _teacher(model: PlannedRun, stage: PlannedStage) -> None:
    elements = 3 * writers(model)
    stage.add("block of the dense model", elements * model.work.teacher_dtype.itemsize, model.device)


def mixture_stages(model: PlannedRun, block: Block) -> list[PlannedStage]:
    """Of one block of experts: collected, fitted one by one, written, the next basis chosen, stored."""
    work, width, item = model.work, model.width, model.item
    before = model.config.boundary_widths[block.index]
    refits, right = work.share > 0, F64 * writers(model)
    _, own = _a_token(model)

    def start(what: str) -> PlannedStage:
        stage = model.stage(f"experts: {what}")
        stage.add("layer as stored", writers(model) * item, "host")
        stage.add("bases", F64 * width * before + item * width * before, model.device)
        stage.add("block of the sliced model", 2 * columns(model) * before * item, model.device)
        stage.add("block of the sliced model", writers(model) * item, model.device)
        if work.on_gpu or model.centred:
            stage.add(
                "output weights before the fit",
                right if model.centred else writers(model) * item,
                model.device,
            )
        return stage

    stages, kept = [], 0
    passing = _batch(model, work.fitted_tokens)
    if refits:
        collecting = start("collecting")
        _teacher(model, collecting)
        filed = _collected(model, collecting, passing)
        activations = work.fitted_tokens * own * item
        kept = activations if 2 * activations <= model.free(collecting) and not filed else 0
        collecting.add("activations kept", kept, model.device)
        fitting, size = start("fitting"), _largest(model)
        fitting.add("moments", _moments(model), "disk" if filed else model.device)
        fitting.add("activations kept", kept, model.device)
        fitting.add("fits", work.ridges * right, model.device)
        fitting.add("system or its inverse", F64 * size * size, model.device)
        fitting.add("right-hand side or solution", 2 * F64 * size * width, model.device)
        stages += [collecting, fitting]
    after = [start(what) for what in ("writing", "choosing the next basis", "storing")]
    for stage in after:
        stage.add("fits", work.ridges * right if refits else 0, model.device)
    after[0].add("covariance", F64 * width * width, model.device)
    after[0].add("activations kept", kept, model.device)
    after[0].add("batch", passing, model.device)
    after[1].add("eigensolver", 8 * F64 * width * width, model.device)
    after[2].add("bases", F64 * width * width, model.device)
    after[2].add("output weights on their basis", 2 * writers(model) * item, model.device)
    return [*stages, *after]


def mixture_allocation(model: PlannedRun, block: Block) -> list[PlannedStage]:
    """What deleting the neurons of a layer of experts costs."""
    work = model.work
    batches = math.ceil(SHARE * math.ceil(work.samples / work.batch_size))
    looked_at = min(math.ceil(batches / work.ranks) * work.batch_tokens, work.tokens)
    streams = looked_at / (work.tokens + work.fitted_tokens)
    stages = [
        model.stage(f"allocation: {what}", streams)
        for what in ("collecting experts", "deleting from experts")
    ]
    for stage in stages:
        stage.add("layer as stored", writers(model) * model.item, "host")
    _teacher(model, stages[0])
    filed = _collected(model, stages[0], _batch(model, looked_at))
    stages[1].add("moments", _moments(model), "disk" if filed else model.device)
    size = _largest(model)
    stages[1].add("system or its inverse", F64 * size * size, model.device)
    stages[1].add("right-hand side or solution", 2 * F64 * size * model.width, model.device)
    return stages
