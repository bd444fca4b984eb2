"""`slicegpt bench token`: the time per token of decoding, without the prompt."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from slicegpt.bench.harness.comparison import compare, token_ratios
from slicegpt.bench.harness.memory import bytes_in_use, peak_bytes, release_unused_memory, start_peak
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import CacheFlush, DeviceTimer, milliseconds_of, quantiles, synchronise
from slicegpt.bench.models.decoders import GreedyDecoder
from slicegpt.bench.models.devices import DevicePeaks
from slicegpt.bench.models.engines import (
    BenchmarkCase,
    NotApplicable,
    cache_bytes,
    errors_as_not_applicable,
    groups_by_memory,
    not_measured,
    start_decoder,
)
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.profiling import Trace, named_range
from slicegpt.progress import Progress

# Share of the free memory for the weights of networks that take turns; the rest is for caches.
RESIDENT_SHARE = 0.7


@dataclass(frozen=True)
class TokenOptions:
    """How to measure.

    Attributes:
        tokens: timed steps, split over `rounds` turns.
        prompt: tokens of the prompt.
        batch: number of sequences.
        warmup: untimed steps before; the first step of every turn is untimed as well.
        cold: flush the last-level cache before every step.
        traced: leave room for the two steps that `trace_steps` records.
    """

    tokens: int = 128
    prompt: int = 16
    batch: int = 1
    rounds: int = 8
    warmup: int = 4
    cold: bool = False
    traced: bool = False

    @property
    def length(self) -> int:
        steps = self.warmup + self.tokens + len(self.shares()) + 2 * self.traced
        return self.prompt + 1 + steps

    def shares(self) -> list[int]:
        """Steps of each round, as equal as possible."""
        rounds = min(self.rounds, self.tokens)
        return [self.tokens // rounds + (index < self.tokens % rounds) for index in range(rounds)]


@dataclass
class DecodingRun:
    """A case while it decodes: its decoder, None after a failure, and its measurements."""

    case: BenchmarkCase
    decoder: GreedyDecoder | None
    prompt_ms: float
    setup_seconds: float
    resident: int
    extra: int
    times: list[float] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        self.weight_bytes, self.stored_bytes = self.decoder.weight_bytes, self.decoder.stored_bytes

    def row(self, options: TokenOptions, peaks: DevicePeaks | None) -> dict:
        """A result row of the measurements so far."""
        network, engine = self.case.network, self.case.engine
        # The cache holds the prompt, the warm-up, and on average half of the tokens decoded since.
        context = options.prompt + 1 + options.warmup + len(self.times) / 2
        moved = self.weight_bytes + cache_bytes(network, options.batch, context)
        seen = quantiles(self.times)
        gpus = int(network.device.type == "cuda")  # the harness runs on one
        rate = moved / seen.median / 1e6
        own = {"bytes": self.stored_bytes} if engine.own_weights else {}
        return {
            **network.facts(),
            **own,
            "engine": engine.name,
            "batch": options.batch,
            "tokens": len(self.times),
            "ms_median": seen.median,
            "ms_p10": seen.p10,
            "ms_p90": seen.p90,
            "gpu_ms": gpus * seen.median or None,
            "tokens_per_second": 1000 * options.batch / seen.median,
            "prompt_ms": self.prompt_ms,
            "read_bytes": round(moved),
            "gigabytes_per_second": rate,
            "bandwidth_fraction": rate / peaks.bandwidth if peaks else None,
            "peak_bytes": self.stored_bytes + self.extra,
            "setup_seconds": self.setup_seconds,
        }


def prompt_ids(case: BenchmarkCase, batch: int, tokens: int) -> torch.Tensor:
    """Random tokens [batch, tokens], the same for every case with the same vocabulary size."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = case.network.config.vocab_size
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(case.network.device)


def prepare(case: BenchmarkCase, options: TokenOptions) -> DecodingRun:
    """Process the prompt and warm up; raises `NotApplicable` where the engine fails."""
    network = case.network
    ids = prompt_ids(case, options.batch, options.prompt)
    began = time.perf_counter()
    with errors_as_not_applicable():
        start_decoder(case, options.batch, options.length).prompt(ids)  # loads, allocates, tunes
        release_unused_memory(network.device)
        before = bytes_in_use(network.device)
        start_peak(network.device)
        decoder = start_decoder(case, options.batch, options.length)
        prompt_ms = milliseconds_of(lambda: decoder.prompt(ids), network.device)
        decoder.steps(options.warmup, after=lambda: None)
        synchronise(network.device)
    seconds = time.perf_counter() - began
    extra = max(0, peak_bytes(network.device) - before)
    return DecodingRun(case, decoder, prompt_ms, seconds, bytes_in_use(network.device) - before, extra)


def decode(run: DecodingRun, steps: int, flush: Callable[[], object] | None) -> None:
    """Time `steps` steps of a run. The device is synchronised after every step, as when tokens are streamed."""
    device, watch, tokens = run.case.network.device, DeviceTimer(run.case.network.device), []
    level = bytes_in_use(device)
    start_peak(device)

    def before() -> None:
        if flush is not None:
            flush()
        synchronise(device)
        watch.mark()

    def after() -> None:
        watch.mark()
        synchronise(device)
        tokens.append(run.decoder.tokens.clone())

    run.decoder.steps(steps, after, before)
    run.times += watch.milliseconds()[::2]  # the time of a step, not the time between steps
    run.tokens += tokens
    run.extra = max(run.extra, run.resident + peak_bytes(device) - level)


def decode_or_stop(run: DecodingRun, steps: int, flush: Callable[[], object] | None) -> str | None:
    """`decode`; on failure the decoder is dropped and the reason returned."""
    try:
        with errors_as_not_applicable():
            decode(run, steps, flush)
    except NotApplicable as reason:
        run.decoder = None
        return str(reason)
    return None


def stopped(run: DecodingRun, reason: str, options: TokenOptions) -> dict:
    """The row of "skipped" of a run that failed while it decoded."""
    if not run.times:
        return not_measured(run.case, reason)
    return not_measured(run.case, f"{len(run.times)} of {options.tokens} tokens: {reason}", partial=True)


def same_tokens(run: DecodingRun, runs: Sequence[DecodingRun]) -> int:
    """The length of the common prefix with the tokens of the engine that decoded most of them with the same weights.

    Engines with the same weights choose the same tokens until rounding decides between two equally likely ones; one
    with weights of its own is compared with itself. Hugging Face's class and this package's share weights only where
    these come from a folder.
    """
    network = run.case.network
    shares = [
        one
        for one in runs
        if one.case.network is network
        and (one is run or not (one.case.engine.own_weights or run.case.engine.own_weights))
        and (network.folder is not None or one.case.engine.huggingface == run.case.engine.huggingface)
    ]
    first = max(shares, key=lambda one: len(one.tokens))
    pairs = zip(run.tokens, first.tokens, strict=False)
    return next(
        (index for index, (a, b) in enumerate(pairs) if not torch.equal(a.cpu(), b.cpu())), len(run.tokens)
    )


def check_positions(cases: Sequence[BenchmarkCase], length: int, options: str) -> None:
    for case in cases:
        most = case.network.config.max_position_embeddings
        if length > most:
            raise SliceGPTError(
                f"{options}: {length} tokens are beyond the {most} positions of {case.network.label}"
            )


def measure_token_times(
    cases: Sequence[BenchmarkCase],
    options: TokenOptions,
    peaks: DevicePeaks | None,
    record: Record,
    progress: Progress | None = None,
    trace: str | None = None,
) -> None:
    """Decode with every case in turns; `record` holds a row for each case as soon as it has
    decoded its first share of tokens.

    Cases whose weights do not fit into memory together are measured group by group. A case that fails keeps its results
    of earlier rounds, is listed in `record.content["skipped"]`, and the other cases continue.

    Args:
        peaks: of the device, for the fraction of its bandwidth; None omits it.
        trace: a file for a Chrome trace of one more step of every case, with named ranges, after all that is timed.
    """
    traced = None if trace is None else Trace(cases[0].network.device)
    check_positions(cases, options.length, "--prompt, --tokens")
    progress = progress or Progress(quiet=True)
    device = cases[0].network.device
    flush = CacheFlush(device) if options.cold else None
    finished: list[dict] = []
    skipped = record.content.setdefault("skipped", [])

    def save_rows(runs: Sequence[DecodingRun]) -> None:
        rows = finished + [run.row(options, peaks) for run in runs]
        for row, run in zip(rows[len(finished) :], runs, strict=True):
            row["same_tokens"] = same_tokens(run, runs)
        baseline = compare(rows, "ms_median", smaller_is_better=True)
        record.save(rows=rows, baseline=baseline, ratios=token_ratios(rows))

    groups = groups_by_memory(cases, RESIDENT_SHARE * free_memory(device))
    for group in groups:
        runs: list[DecodingRun] = []
        with progress.stage("prompts and warm-up", len(group), "cases") as advance:
            for case in group:
                failed = False
                try:
                    runs.append(prepare(case, options))
                except NotApplicable as reason:
                    skipped.append(not_measured(case, reason))
                    failed = True
                if failed:  # outside the except clause, whose error holds tensors
                    release_unused_memory(device)
                advance(1)
        with progress.stage("decoding", options.tokens * len(runs), "steps") as advance:
            for share in options.shares():
                for run in runs:
                    if run.decoder is not None:
                        reason = decode_or_stop(run, share, flush)
                        if reason is not None:
                            skipped.append(stopped(run, reason, options))
                            release_unused_memory(device)
                    advance(share)
                    # After every case: one that hangs takes no other's figures with it. Nothing of this is timed, and
                    # the first step of the next turn, whose caches it fills, is not either.
                    save_rows([one for one in runs if one.times])
                runs = [run for run in runs if run.decoder is not None or run.times]
        finished = list(record.rows)
        if traced is not None:
            trace_steps([run for run in runs if run.decoder is not None], traced)
        runs.clear()
        for network in {id(case.network): case.network for case in group}.values():
            network.release()
    record.save(taken_in_turns=len(groups) == 1)
    if traced is not None:
        traced.write(trace)


def trace_steps(runs: Sequence[DecodingRun], trace: Trace) -> None:
    """Record one step of every run, in a range named "network, engine / step", and the one before that warms up."""

    def once() -> None:
        for run in runs:
            device = run.case.network.device
            span = named_range(f"{run.case.network.label}, {run.case.engine.name} / step", device)

            def ended(span=span, device=device) -> None:
                synchronise(device)
                span.__exit__(None, None, None)

            run.decoder.steps(1, ended, span.__enter__)

    trace.record(once)
