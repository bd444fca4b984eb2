"""`slicegpt bench layers`: the time of every operation of one transformer layer, shortcuts included.

The published table of operation times omits the shortcuts; here they are operations like the others, and the sum is
compared with the time of the whole layer, measured separately.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slicegpt.bench.commands import layer_fused, layer_ops
from slicegpt.bench.commands.layer_ops import LayerRun
from slicegpt.bench.harness.comparison import compare
from slicegpt.bench.harness.memory import release_unused_memory
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import CacheFlush, DeviceTimer, last_level_cache
from slicegpt.bench.models.networks import MeasuredNetwork
from slicegpt.errors import SliceGPTError, first_line
from slicegpt.hardware.profiling import Trace, named_range
from slicegpt.progress import Progress

# Largest relative difference between the sum of the operations and the whole layer that counts as agreement.
AGREEMENT = 0.1

# Cycles that a GPU spins before a layer is timed, about a millisecond, while the CPU queues all its kernels: without
# gaps between launches the events measure the kernels alone.
SPIN_CYCLES = 2_000_000

# Results are saved this often: an interrupted run loses at most so much.
SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class LayersOptions:
    """How to measure.

    Attributes:
        batch, seqlen: of the input.
        repeats: runs, of which the fastest quarter counts: other load only adds time.
        cold: flush the last-level cache before each.
        sparse: measure 2:4 weights too, where they run.
    """

    batch: int = 1
    seqlen: int = 2048
    repeats: int = 40
    cold: bool = False
    sparse: bool = True


def spin(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(SPIN_CYCLES)


@torch.no_grad()
def time_operations(run: LayerRun, device: torch.device) -> list[float]:
    """Milliseconds of every operation, in order."""
    state, watch = dict(run.state), DeviceTimer(device)
    spin(device)
    watch.mark()
    for operation in run.operations:
        operation.run(state)
        watch.mark()
    return watch.milliseconds()


@torch.no_grad()
def time_whole(run: Callable[[], object], device: torch.device) -> float:
    watch = DeviceTimer(device)
    spin(device)
    watch.mark()
    run()
    watch.mark()
    return watch.milliseconds()[0]


@torch.no_grad()
def time_marked(run: Callable[[Callable], object], device: torch.device) -> float:
    """Milliseconds of a run that marks its own beginning and end."""
    watch = DeviceTimer(device)
    spin(device)
    run(watch.mark)
    return watch.milliseconds()[0]


@torch.no_grad()
def check(run: LayerRun) -> None:
    """Raise `SliceGPTError` unless the operations, in order, compute the layer."""
    state = dict(run.state)
    for operation in run.operations:
        operation.run(state)
    expected = (run.reference or run.whole)().float()
    run.reference = None  # frees its weights, where the operations have other ones
    got = state["output"].float().view(expected.shape)
    error = ((got - expected).norm() / expected.norm()).item()
    # The orders of summation differ: some roundings of the dtype, of sums of size 1.
    if not error < 16 * torch.finfo(run.state["stream"].dtype).eps:
        raise SliceGPTError(f"{run.variant}: the operations differ from the layer by {error:.2g}")


@dataclass
class LayerVariant:
    """A network's layer on one engine; `make` builds it with its weights."""

    name: str
    engine: str
    network: MeasuredNetwork
    make: Callable[[], LayerRun]


def variants_of(
    networks: Sequence[MeasuredNetwork], options: LayersOptions
) -> tuple[list[LayerVariant], list[dict]]:
    """Every network's layer unfused and fused, the dense one also with 2:4 weights; and rows of "skipped"."""
    variants, skipped = [], []
    for network in networks:
        shape = (network.config, options.batch, options.seqlen, network.dtype, network.device)
        names = {engine: f"{network.label}, {engine}" for engine in ("unfused", "fused", "2:4")}
        variants.append(
            LayerVariant(
                names["unfused"],
                "unfused",
                network,
                lambda s=shape, n=names: layer_ops.unfused(n["unfused"], *s),
            )
        )
        reasons = {"fused": layer_fused.reason_against(network.config)}
        if network.is_dense:
            reasons["2:4"] = (
                layer_ops.reason_against_2_4(network.dtype, network.device)
                if options.sparse
                else "left out: --no-sparse"
            )
        makers = {"fused": layer_fused.fused, "2:4": layer_ops.sparse_2_4}
        for engine, reason in reasons.items():
            if reason is None:
                variants.append(
                    LayerVariant(
                        names[engine],
                        engine,
                        network,
                        lambda s=shape, n=names[engine], make=makers[engine]: make(n, *s),
                    )
                )
            else:
                skipped.append({"network": network.label, "engine": engine, "skipped": reason})
    return variants, skipped


def fastest_quarter(runs: Sequence, key: Callable | None = None) -> list:
    """The quarter with the smallest values, at least one."""
    return sorted(runs, key=key)[: max(1, len(runs) // 4)]


def row_of(variant: LayerVariant, run: LayerRun, operations: list[list[float]], wholes: list[float]) -> dict:
    """A result row: the operations, their sum, and the whole layer; means over the fastest quarter of the runs."""
    names = [operation.name for operation in run.operations]
    columns = zip(*fastest_quarter(operations, key=sum), strict=True)
    times = dict(zip(names, map(statistics.fmean, columns), strict=True))
    layer = statistics.fmean(fastest_quarter(wholes))
    total = sum(times.values())
    return {
        "variant": variant.name,
        **variant.network.facts(),
        # Not 0: pruned weights are no dense baseline.
        "slice": None if variant.engine == "2:4" else variant.network.slice,
        "engine": variant.engine,
        "library": run.library,
        "operations": times,
        "total_ms": total,
        "layer_ms": layer,
        "difference": total / layer - 1,
        "agrees": abs(total / layer - 1) <= AGREEMENT,
        # A fused shortcut is part of other operations.
        "shortcut_ms": None
        if any("+" in name for name in times)
        else sum(time for name, time in times.items() if "shortcut" in name),
    }


def whole_row(network: MeasuredNetwork, times: list[float]) -> dict:
    """A result row of Hugging Face's own layer, timed only as a whole."""
    return {
        "variant": f"{network.label}, Hugging Face",
        **network.facts(),
        "engine": "hf",
        "operations": {},
        "total_ms": None,
        "layer_ms": statistics.fmean(fastest_quarter(times)),
        "difference": None,
        "agrees": None,
        "shortcut_ms": None,
    }


def measure_layers(
    networks: Sequence[MeasuredNetwork],
    options: LayersOptions,
    record: Record,
    progress: Progress | None = None,
    trace: str | None = None,
) -> None:
    """Time one layer of every network in every variant, in turns; `record.rows` holds a row for each variant.

    Args:
        trace: a file for a Chrome trace of one run of every variant, with named ranges.
    """
    progress = progress or Progress(quiet=True)
    device = networks[0].device
    variants, skipped = variants_of(networks, options)
    record.content["skipped"] = skipped
    with progress.stage("layers", len(variants), "layers") as advance:
        runs = []
        for variant in list(variants):
            try:
                run = variant.make()
                check(run)
                runs.append(run)
            except (RuntimeError, NotImplementedError) as error:
                # Which shapes the sparse library supports differs between its releases.
                if variant.engine != "2:4":
                    raise
                variants.remove(variant)
                reason = first_line(error)
                skipped.append({"network": variant.network.label, "engine": "2:4", "skipped": reason})
            advance(1)
    hugging = [
        (
            network,
            layer_ops.huggingface_whole(
                network.huggingface_config, options.batch, options.seqlen, network.dtype, device
            ),
        )
        for network in networks
        if network.is_dense
    ]
    flush = CacheFlush(device) if options.cold else None
    operations: list[list[list[float]]] = [[] for _ in runs]
    wholes: list[list[float]] = [[] for _ in runs]
    others: list[list[float]] = [[] for _ in hugging]

    def round_of_all() -> None:
        for index, run in enumerate(runs):
            before = flush or (lambda run=run: time_operations(run, device))
            before()  # flushes the cache, or warms it with this layer's weights
            operations[index].append(time_operations(run, device))
            before()
            wholes[index].append(time_whole(run.whole, device))
        for index, (_, run) in enumerate(hugging):
            before = flush or (lambda run=run: time_marked(run, device))
            before()
            others[index].append(time_marked(run, device))

    def save(rounds: int) -> None:
        rows = [whole_row(network, times) for (network, _), times in zip(hugging, others, strict=True)]
        rows += [row_of(*four) for four in zip(variants, runs, operations, wholes, strict=True)]
        record.save(rows=rows, baseline=compare(rows, "layer_ms", smaller_is_better=True), rounds=rounds)

    record.content["cache_note"] = cache_note(networks[0], options)
    saved = time.monotonic()
    with progress.stage("timing", options.repeats, "rounds") as advance:
        round_of_all()
        for times in (*operations, *wholes, *others):
            times.clear()  # that round was a warm-up
        for turn in range(1, options.repeats + 1):
            round_of_all()
            advance(1)
            # Not after every round: writing a file fills the caches with other data.
            if turn == options.repeats or time.monotonic() - saved > SAVE_SECONDS:
                save(turn)
                saved = time.monotonic()
    if trace:
        with progress.stage(f"trace: {trace}", 1, "file"):
            write_trace(runs, device, trace)
    release_unused_memory(device)


def cache_note(network: MeasuredNetwork, options: LayersOptions) -> str | None:
    """A warning where a layer fits into the cache and so looks faster than it is inside a model; else None."""
    cache = last_level_cache(network.device)
    layer = network.bytes // max(1, network.config.num_hidden_layers)
    if options.cold or layer > cache:
        return None
    return (
        f"A layer's weights fit into the last cache ({cache >> 20} MiB), where a model's layers would not find them: "
        "--cold-l2 measures without."
    )


def write_trace(runs: Sequence[LayerRun], device: torch.device, file: str) -> None:
    """One run of every variant as a Chrome trace; ranges are named "variant / operation"."""

    def once() -> None:
        for run in runs:
            state = dict(run.state)
            for operation in run.operations:
                with named_range(f"{run.variant} / {operation.name}", device):
                    operation.run(state)

    trace = Trace(device)
    trace.record(once)
    trace.write(file)
