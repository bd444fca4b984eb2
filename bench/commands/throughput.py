"""`slicegpt bench throughput`: most tokens/s over all batches, at a given sequence length."""

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
    start,
)
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling.sizes import format_bytes
from slicegpt.progress import Progress

WARMUP = 2
# Steps before those that are timed: each of two series begins with one that nobody watches.
UNTIMED = WARMUP + 2


@dataclass(frozen=True)
class ThroughputOptions:
    """How to measure.

    Attributes:
        seqlen: tokens of a sequence at its end.
        steps: that are timed, around the middle of the sequence; None takes all of it but the first few.
        max_batch: largest batch to try.
        max_memory: bytes that weights and run of one network may take; None leaves it to the device.
        tolerance: relative changes of throughput below it are noise.
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
    """Measures one case at any batch, within the memory limit."""

    def __init__(self, case: BenchmarkCase, options: ThroughputOptions, record: Record):
        self.case, self.options, self.record = case, options, record
        self.device = case.network.device
        self.per_sequence = self.least_per_sequence()
        self.stored = case.network.bytes
        self.leaked = 0
        self.largest_that_ran = 0
        self.points: list[dict] = []

    def least_per_sequence(self) -> float:
        """Bytes that one more sequence cannot do without: its cache and its logits, in float32 as most engines do."""
        network = self.case.network
        return cache_bytes(network, 1, self.options.seqlen) + 4 * network.config.vocab_size

    def check(self, batch: int) -> None:
        """`BatchTooLarge` where the estimate is above the limit."""
        limit = self.options.max_memory
        needed = self.stored + batch * self.per_sequence
        if limit is not None and needed > limit:
            raise BatchTooLarge(
                f"memory limit: batch {batch} would take {format_bytes(needed)} of {format_bytes(limit)}"
            )

    def warm_up(self) -> None:
        """Weights into memory, kernels chosen: the first measurement shall not pay for them."""
        with errors_as_not_applicable(self.case):
            decoder = start(self.case, 1, UNTIMED)
            decoder.fill(1)
            self.steps(decoder, WARMUP)
            self.stored = decoder.stored_bytes
        del decoder
        release_unused_memory(self.device)

    def attempt(self, batch: int) -> tuple[float, int]:
        """`decode`, after which the memory is as before; `NotApplicable` where it fails."""
        level = bytes_in_use(self.device)
        failed = None
        try:
            with errors_as_not_applicable(self.case):
                measured = self.decode(batch)
        except NotApplicable as reason:
            failed = type(reason)(f"{reason} at batch {batch}")  # without what the error holds on to
        release_unused_memory(self.device, collect=failed is not None)
        self.leaked = max(self.leaked, bytes_in_use(self.device) - level)
        if failed is not None:
            raise failed
        return measured

    def __call__(self, batch: int) -> float:
        """Tokens/s at this batch; every measurement is a point of the record."""
        self.check(batch)
        try:
            milliseconds, extra = self.attempt(batch)
        except OutOfMemory as reason:
            raise BatchTooLarge(str(reason)) from None
        # What is needed once for any batch shrinks in this as the batch grows.
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
        decoder = start(self.case, batch, options.length)
        decoder.fill(options.context - UNTIMED)
        self.steps(decoder, WARMUP)
        times = self.steps(decoder, options.timed)
        return statistics.median(times), max(0, peak_bytes(self.device) - before)

    def steps(self, decoder: GreedyDecoder, count: int) -> list[float]:
        """Milliseconds of every step but one before; a GPU is not waited for in between."""
        watch = DeviceTimer(self.device)
        decoder.steps(count, after=watch.mark, before=watch.mark)
        return watch.milliseconds()[::2]


@dataclass
class ThroughputRun:
    """A case, how it was probed, and what the search found so far."""

    prober: BatchProber
    search: BatchSearch
    again: list[float]
    failed: bool = False

    def row(self) -> dict:
        case, search = self.prober.case, self.search
        points = self.prober.points
        # What else a machine does only slows this down: the fastest of as many measurements of every case moves less
        # between runs than the median of a few at one batch, itself chosen among many that are as good.
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
    """Search every case's best batch, then measure those again in turns; `record` is kept up to date.

    `record.content` gets "points", one a measurement of the search, and "rows", one a case: the most tokens/s that was
    measured and its batch, and "rounds", what the search's best batch gave when it was measured again. A case that
    fails, other than by memory in the search, keeps what it did before, is reported among "skipped", and leaves the
    others running.
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
                if found.failed:  # once the error is gone, which holds on to memory
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
