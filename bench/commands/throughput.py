"""`slicegpt bench throughput`: the highest tokens/s over all batch sizes, at a given sequence length."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from slicegpt.bench.commands.batch_search import BatchSearch, BatchTooLarge, search_batches
from slicegpt.bench.commands.token_time import RESIDENT_SHARE, check_positions
from slicegpt.bench.harness.comparison import compare
from slicegpt.bench.harness.memory import bytes_in_use, peak_bytes, release_unused_memory, start_peak
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import DeviceTimer
from slicegpt.bench.models.decoders import GreedyDecoder
from slicegpt.bench.models.engines import (
    BenchmarkCase,
    NotApplicable,
    OutOfMemory,
    cache_bytes,
    errors_as_not_applicable,
    groups_by_memory,
    not_measured,
    start_decoder,
)
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling.sizes import format_bytes
from slicegpt.progress import Progress

WARMUP = 2
# Steps before the timed ones: the warm-up, and the untimed first step of each of the two series.
UNTIMED = WARMUP + 2


@dataclass(frozen=True)
class ThroughputOptions:
    """How to measure.

    Attributes:
        seqlen: tokens of a sequence, at its end.
        steps: timed steps, in the middle of the sequence; None times all but the first few.
        max_batch: largest batch to try.
        max_memory: bytes that the weights and the run of one network may take; None: as much as the device has.
        tolerance: relative changes of throughput below it count as noise.
        rounds: turns in which the best batches are measured again.
    """

    seqlen: int = 128
    steps: int | None = None
    max_batch: int = 1 << 16
    max_memory: float | None = None
    tolerance: float = 0.02
    rounds: int = 3

    @property
    def timed(self) -> int:
        return min(self.steps or self.seqlen, max(1, self.seqlen - UNTIMED - 1))

    @property
    def context(self) -> int:
        """Tokens in the cache before the first step that is timed."""
        return max((self.seqlen - self.timed) // 2, UNTIMED + 1)

    @property
    def length(self) -> int:
        """Tokens in the cache at the end."""
        return max(self.seqlen, self.context + self.timed)


class BatchProber:
    """Measures one case at any batch size, within the memory limit."""

    def __init__(self, case: BenchmarkCase, options: ThroughputOptions, record: Record):
        self.case, self.options, self.record = case, options, record
        self.device = case.network.device
        self.per_sequence = self.least_per_sequence()
        self.stored = case.network.bytes
        self.leaked = 0
        self.largest_that_ran = 0
        self.points: list[dict] = []

    def least_per_sequence(self) -> float:
        """Lower bound of the bytes of one more sequence: its cache, and its logits in float32, as in most engines."""
        network = self.case.network
        return cache_bytes(network, 1, self.options.seqlen) + 4 * network.config.vocab_size

    def check(self, batch: int) -> None:
        """Raise `BatchTooLarge` where the estimated memory is above the limit."""
        limit = self.options.max_memory
        needed = self.stored + batch * self.per_sequence
        if limit is not None and needed > limit:
            raise BatchTooLarge(
                f"memory limit: batch {batch} would take {format_bytes(needed)} of {format_bytes(limit)}"
            )

    def warm_up(self) -> None:
        """Load the weights and choose kernels, so that the first measurement does not include it."""
        with errors_as_not_applicable():
            decoder = start_decoder(self.case, 1, UNTIMED)
            decoder.fill(1)
            self.steps(decoder, WARMUP)
            self.stored = decoder.stored_bytes
        del decoder
        release_unused_memory(self.device)

    def attempt(self, batch: int) -> tuple[float, int]:
        """`decode`, then release its memory; raises `NotApplicable` where it fails."""
        level = bytes_in_use(self.device)
        failed = None
        try:
            with errors_as_not_applicable():
                measured = self.decode(batch)
        except NotApplicable as reason:
            failed = type(reason)(
                f"{reason} at batch {batch}"
            )  # a new error: the old one's traceback holds tensors
        release_unused_memory(self.device, collect=failed is not None)
        self.leaked = max(self.leaked, bytes_in_use(self.device) - level)
        if failed is not None:
            raise failed
        return measured

    def __call__(self, batch: int) -> float:
        """Tokens/s at this batch; every measurement is added to the record's points."""
        self.check(batch)
        try:
            milliseconds, extra = self.attempt(batch)
        except OutOfMemory as reason:
            raise BatchTooLarge(str(reason)) from None
        # Includes memory that is needed once, whatever the batch: its share shrinks as the batch grows.
        self.per_sequence = max(self.least_per_sequence(), extra / batch)
        total = self.stored + extra
        if self.options.max_memory is not None and total > self.options.max_memory:
            raise BatchTooLarge(
                f"memory limit: batch {batch} took {format_bytes(total)} "
                f"of {format_bytes(self.options.max_memory)}"
            )
        rate = 1000 * batch / milliseconds
        self.largest_that_ran = max(self.largest_that_ran, batch)
        point = {
            "network": self.case.network.label,
            "engine": self.case.engine.name,
            "batch": batch,
            "tokens_per_second": rate,
            "ms_median": milliseconds,
            "peak_bytes": total,
        }
        self.points.append(point)
        self.record.content["points"].append(point)
        return rate

    def decode(self, batch: int) -> tuple[float, int]:
        """Median milliseconds of a step, and bytes beyond the weights."""
        options = self.options
        before = bytes_in_use(self.device)
        start_peak(self.device)
        decoder = start_decoder(self.case, batch, options.length)
        decoder.fill(options.context - UNTIMED)
        self.steps(decoder, WARMUP)
        times = self.steps(decoder, options.timed)
        return statistics.median(times), max(0, peak_bytes(self.device) - before)

    def steps(self, decoder: GreedyDecoder, count: int) -> list[float]:
        """Milliseconds of every step after an untimed one; a GPU is not synchronised between steps."""
        watch = DeviceTimer(self.device)
        decoder.steps(count, after=watch.mark, before=watch.mark)
        return watch.milliseconds()[::2]


@dataclass
class ThroughputRun:
    """A case, its measurements, and the state of the search for its best batch."""

    prober: BatchProber
    search: BatchSearch
    again: list[float]
    failed: bool = False

    def row(self) -> dict:
        case, search = self.prober.case, self.search
        points = self.prober.points
        # Other load only slows a measurement down: the fastest of as many measurements for every case varies less
        # between runs than the median of a few at one batch, itself chosen among many that are about as good.
        rates = [(point["tokens_per_second"], point["batch"]) for point in points]
        rates += [(rate, search.best) for rate in self.again]
        rate, best = max(rates, default=(None, None))
        peaks = [point["peak_bytes"] for point in points if point["batch"] == best]
        return {
            **case.network.facts(),
            "engine": case.engine.name,
            "batch": best,
            "tokens_per_second": rate,
            "rounds": self.again,
            "largest_batch": self.prober.largest_that_ran,
            "peak_bytes": max(peaks, default=None),
            "stop": search.stop,
            "reason": search.reason,
            "leaked_bytes": self.prober.leaked,
        }


def measure_throughput(
    cases: Sequence[BenchmarkCase],
    options: ThroughputOptions,
    record: Record,
    progress: Progress | None = None,
) -> None:
    """Search every case's best batch, then measure these again in turns; `record` is saved after every measurement.

    `record.content` gets "points", one for each measurement of the search, and "rows", one for each case: the highest
    tokens/s measured and its batch, and "rounds", the rates of the search's best batch when it was measured again. A
    case that fails, other than by memory in the search, keeps its earlier results, is listed in "skipped", and the
    other cases continue.
    """
    check_positions(cases, options.seqlen, "--seqlen")
    progress = progress or Progress(quiet=True)
    device = cases[0].network.device
    record.content |= {"points": [], "skipped": record.content.get("skipped", [])}
    done: list[ThroughputRun] = []

    def fail(found: ThroughputRun, reason: NotApplicable) -> None:
        found.failed = True
        record.content["skipped"].append(not_measured(found.prober.case, reason, bool(found.search.rates)))
        if not found.search.rates:
            done.remove(found)

    def save(**figures) -> None:
        rows = [one.row() for one in done]
        baseline = compare(rows, "tokens_per_second", smaller_is_better=False)
        record.save(rows=rows, baseline=baseline, **figures)

    groups = groups_by_memory(cases, RESIDENT_SHARE * free_memory(device))
    for group in groups:
        begun = len(done)
        for case in group:
            found = ThroughputRun(BatchProber(case, options, record), BatchSearch(), [])

            def measure(batch: int, found=found) -> float:
                rate = found.prober(batch)
                save()
                return rate

            done.append(found)
            with progress.stage(f"search: {case.name}", 1, "search") as advance:
                try:
                    found.prober.warm_up()
                    search_batches(measure, options.tolerance, options.max_batch, found.search)
                except NotApplicable as reason:
                    found.search.stop, found.search.reason = "error", str(reason)
                    fail(found, reason)
                if found.failed:  # outside the except clause, whose error holds tensors
                    release_unused_memory(device)
                advance(1)
            save()
        with progress.stage("best batches again", options.rounds, "rounds") as advance:
            for _ in range(options.rounds):
                for found in done[begun:]:
                    if not found.search.rates or found.failed:
                        continue
                    best = found.search.best
                    try:
                        milliseconds, _ = found.prober.attempt(best)
                        found.again.append(1000 * best / milliseconds)
                    except NotApplicable as reason:
                        fail(found, NotApplicable(f"measured again: {reason}"))
                advance(1)
                save()
        for network in {id(case.network): case.network for case in group}.values():
            network.release()
    save(taken_in_turns=len(groups) == 1)
