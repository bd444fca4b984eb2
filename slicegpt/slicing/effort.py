"""How many operations a run of slicing takes, of which kind, and how long that is at given rates.

    half       products of activations and weights in the run's dtype: forward passes, moments, lifting onto bases
    fp64       factors, solutions and inverses, weights folded and brought onto bases
    gram       covariances in float64, from operands of the run's dtype
    solver     eigenvectors and shortcuts: float64, of which half is reading a matrix again and again

A multiplication and an addition are two operations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.wide_products import products_in_float32
from slicegpt.ops import gram_
from slicegpt.slicing.allocation import FEWEST, SHARE
from slicegpt.slicing.blocks import Block, blocks_of
from slicegpt.slicing.divergence import EVERY
from slicegpt.slicing.plans import EXPONENTS
from slicegpt.slicing.prices import GROUP_LEVELS, LEVELS, TOKENS
from slicegpt.slicing.workload import Workload

KINDS = ("half", "fp64", "gram", "solver")

# Of a symmetric matrix: reduction to tridiagonal form 4/3 D³, its eigenvectors up to 3 D³, brought back 2 D³; then the
# singular vectors that align two bases, checks and products with them, about 6 D³.
SOLVER = 12

# Share of a rate that is reached, as a first guess: large products on a data sheet's GPU; and of eigensolvers, whose
# reduction is bound by memory.
PAPER_EFFICIENCY = 0.6
SOLVER_EFFICIENCY = 0.25


@dataclass
class Effort:
    """Operations of each kind, by stage; the stages are those of `SlicingReport.seconds`."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, stage: str, kind: str, operations: float) -> None:
        kinds = self.stages.setdefault(stage, dict.fromkeys(KINDS, 0.0))
        kinds[kind] += operations

    def total(self, kind: str) -> float:
        return sum(kinds[kind] for kinds in self.stages.values())

    def seconds(self, rates: OperationRates) -> dict[str, float]:
        return {
            stage: sum(operations / getattr(rates, kind) for kind, operations in kinds.items())
            for stage, kinds in self.stages.items()
        }


@dataclass(frozen=True)
class OperationRates:
    """Operations a second of each kind, and where they are from."""

    half: float
    fp64: float
    gram: float
    solver: float
    source: str


def paper_rates(half: float, fp64: float, name: str, gram: float | None = None) -> OperationRates:
    """Of a device from its data sheet's peaks, in operations a second.

    Args:
        gram: of covariances, where integer arithmetic makes them faster than float64.
    """
    return OperationRates(
        PAPER_EFFICIENCY * half,
        PAPER_EFFICIENCY * fp64,
        PAPER_EFFICIENCY * max(gram or 0, fp64),
        SOLVER_EFFICIENCY * fp64,
        f"{name}'s data sheet, at {100 * PAPER_EFFICIENCY:.0f} % of its peaks",
    )


def measured_rates(device: torch.device, dtype: torch.dtype) -> OperationRates:
    """Of this machine, by products that take less than a second."""
    size = 512 if device.type == "cpu" else 4096

    def rate(run: Callable[[], object], operations: float) -> float:
        run()
        took = []
        for _ in range(3):
            _synchronise(device)
            began = time.perf_counter()
            run()
            _synchronise(device)
            took.append(time.perf_counter() - began)
        return operations / sorted(took)[1]

    def product(kind: torch.dtype) -> float:
        a = torch.randn(size, size, device=device).to(kind)
        return rate(lambda: a @ a, 2 * size**3)

    rows, matrix = (
        torch.randn(2 * size, size, device=device).to(dtype),
        torch.zeros(size, size, dtype=torch.float64),
    )
    matrix = matrix.to(device)
    with torch.no_grad(), products_in_float32(device):
        half = product(dtype)
    fp64 = product(torch.float64)
    gram = rate(lambda: gram_(matrix, rows), 2 * size * size * size)
    return OperationRates(
        half, fp64, gram, SOLVER_EFFICIENCY * fp64, f"measured on {device} in less than a second"
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def effort_of(config: SlicedConfig, work: Workload) -> Effort:
    """The operations of a run that slices to `config`, on the rank that has most to do."""
    effort, width = Effort(), config.dense_hidden_size
    fitted = work.fitted_tokens
    deletes = config.neurons != config.dense_neurons
    allocation = "prices" if work.prices else "allocation"
    if deletes and work.share and work.prices:
        add_prices(effort, config, work)
    for block in blocks_of(config):
        before, after = config.boundary_widths[block.index : block.index + 2]
        rows, columns = block_shape(config, block, block.parts)
        dense_rows, dense_columns = block_shape(config, block, block.dense_parts)
        own, inputs = (
            columns,
            columns + (before if config.shortcuts[block.index] == "dense" and work.share else 0),
        )
        if block.sparse:
            _add_mixture(effort, config, work, block, deletes)
            continue
        # scores and sums, causal
        passed = config.qk_nope_head_dim or 0
        scores = work.seqlen * config.num_attention_heads * (passed + config.head_dim + config.value_dim)
        scores += 2 * config.expansion_elements
        attention, dense_attention = (
            scores if "attention" in parts else 0 for parts in (block.parts, block.dense_parts)
        )
        if work.share:
            teacher = 2 * width * (dense_rows + dense_columns) + dense_attention
            effort.add("teacher", "half", fitted * teacher)
            moments = inputs * inputs + 2 * inputs * width
            effort.add("refit", "half", fitted * moments)
            gone = 0
            if "mlp" in block.parts:
                gone = config.dense_neurons[block.layer] - config.neurons[block.layer]
            if "attention" in block.parts:
                heads = config.num_attention_heads - config.attention_heads[block.layer]
                gone += heads * config.value_dim
            effort.add("refit", "fp64", work.ridges * solving(inputs - gone, width))
            if gone:
                effort.add("refit", "fp64", selection(inputs, width, gone))
            if deletes and work.allocate:
                effort.add(allocation, "half", SHARE * work.tokens * teacher)
                if "mlp" in block.parts:
                    removed = round((1 - FEWEST) * config.dense_neurons[block.layer])
                    effort.add(allocation, "half", SHARE * work.tokens * moments)
                    effort.add(allocation, "fp64", selection(own, width, removed))
        lifting = 4 * width * before
        effort.add(
            "signals", "half", work.tokens * (lifting + 2 * before * rows + 2 * width * columns + attention)
        )
        effort.add("covariance", "gram", work.tokens * width * width)
        effort.add("eigensolver", "solver", SOLVER * width**3)
        effort.add("rotation", "fp64", 2 * width * (before * rows + max(1, work.ridges) * after * inputs))
    effort.add("rotation", "fp64", 4 * config.vocab_size * width * width)
    if work.share and work.ridges > 1:
        layers = sum(width * sum(block_shape(config, block, block.parts)) for block in blocks_of(config))
        head = config.vocab_size * width
        effort.add("ridge", "half", work.ridges * work.windows * work.seqlen * 2 * (layers + head))
    return effort


def add_prices(effort: Effort, config: SlicedConfig, work: Workload) -> None:
    """The priced windows' way through the networks that are cut, half of the layers on average, and the plans that are
    sliced on a part of the text: of these the passes and the fits, as of the run itself."""
    width, layers = config.dense_hidden_size, config.num_hidden_layers
    weights = sum(width * sum(block_shape(config, block, block.dense_parts)) for block in blocks_of(config))
    networks = (len(LEVELS) + len(GROUP_LEVELS)) * layers
    passes = networks * TOKENS * weights / 2
    logits = (networks + 2) * (TOKENS / EVERY) * config.vocab_size * width
    effort.add("prices", "half", 2 * (passes + logits) / work.ranks)
    tokens = math.ceil(SHARE * work.tokens)
    for block in blocks_of(config):
        rows, columns = block_shape(config, block, block.dense_parts)
        moments = columns * columns + 2 * columns * width
        effort.add("trials", "half", len(EXPONENTS) * tokens * (2 * 2 * width * (rows + columns) + moments))
        gone = config.dense_neurons[block.layer] - config.neurons[block.layer] if "mlp" in block.parts else 0
        fits = solving(columns - gone, width) + (selection(columns, width, gone) if gone else 0)
        effort.add("trials", "fp64", len(EXPONENTS) * fits)


def block_shape(config: SlicedConfig, block: Block, parts: tuple[str, ...]) -> tuple[int, int]:
    """Rows of the layers of these parts that read the stream, and columns of those that write it, before slicing; of a
    mixture of experts those that one token meets."""
    rows = columns = 0
    if block.sparse:
        columns = config.num_experts_per_tok * config.dense_neurons[block.layer]
        columns += config.shared_expert_intermediate_size
        return 2 * columns + config.num_experts, columns
    if "attention" in parts:
        columns += config.num_attention_heads * config.value_dim
        rows += config.attention_rows
    if "mlp" in parts:
        columns += config.dense_neurons[block.layer]
        rows += (2 if config.gated_mlp else 1) * config.dense_neurons[block.layer]
    return rows, columns


def _add_mixture(effort: Effort, config: SlicedConfig, work: Workload, block: Block, deletes: bool) -> None:
    """The operations of a block of experts: each has a system of its own, of its own tokens."""
    width, (rows, columns) = config.dense_hidden_size, block_shape(config, block, block.parts)
    before, after = config.boundary_widths[block.index : block.index + 2]
    neurons, shared = config.dense_neurons[block.layer], config.shared_expert_intermediate_size
    gone, fitted, count = neurons - config.neurons[block.layer], work.fitted_tokens, config.num_experts
    a_token = 2 * width * (rows + columns)
    moments = config.num_experts_per_tok * (neurons * neurons + 2 * neurons * width)
    moments += shared * shared + 2 * shared * width
    if work.share:
        effort.add("teacher", "half", fitted * a_token)
        effort.add("refit", "half", fitted * (moments + 4 * width * columns))
        fits = count * solving(neurons - gone, width) + solving(shared, width)
        effort.add("refit", "fp64", work.ridges * fits)
        if gone:
            effort.add("refit", "fp64", count * selection(neurons, width, gone))
        if deletes and work.allocate:
            effort.add("allocation", "half", SHARE * work.tokens * (a_token + moments))
            removed = round((1 - FEWEST) * neurons)
            effort.add("allocation", "fp64", count * selection(neurons, width, removed))
    effort.add(
        "signals", "half", work.tokens * (4 * width * before + 2 * before * rows + 2 * width * columns)
    )
    effort.add("covariance", "gram", work.tokens * width * width)
    effort.add("eigensolver", "solver", SOLVER * width**3)
    whole = count * neurons + shared
    readers = before * (2 * whole + count)
    effort.add("rotation", "fp64", 2 * width * (readers + max(1, work.ridges) * after * whole))


def solving(size: int, width: int) -> float:
    """Operations of one fit: the factor, K³/3, and two triangular solutions, K² D each."""
    return size**3 / 3 + 2 * size * size * width


def selection(size: int, width: int, removed: int) -> float:
    """Operations of the choice of neurons: a fit, the inverse from its factor, 2/3 K³, and all rounds together, which
    take what is removed out of the inverse and out of the weights."""
    return solving(size, width) + 2 * size**3 / 3 + 2 * removed * size * (size + width)
