"""Progress bars, the lines that take their place, and the log."""

from __future__ import annotations

import io
import logging
import re

import pytest

from slicegpt.progress import Progress, duration, memory_in_use, resident_bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, total: int = 3) -> str:
    with progress.stage("slicing", total, "boundaries") as advance:
        for _ in range(total):
            advance(1)
    return progress.stream.getvalue()


def timed(seconds: float, steps: int, **options) -> list[str]:
    """The lines of a stage of `steps`, each of which takes so many seconds."""
    progress, clock = Progress(stream=io.StringIO()), Clock()
    progress.clock = clock
    with progress.stage("slicing", steps, "steps", **options) as advance:
        for step in range(options.get("done", 0), steps):
            advance.note(f"{step // 10} of {steps // 10} layers")
            clock.now += seconds
            advance(1)
    return progress.stream.getvalue().splitlines()


def test_terminal_gets_a_bar():
    output = run(Progress(stream=Terminal()))
    assert "slicing: 100%" in output
    assert "3/3" in output


def test_bar_shows_tokens_layers_and_memory():
    progress, clock = Progress(stream=Terminal()), Clock()
    progress.clock = clock
    with progress.stage("slicing", 4, "steps", tokens=800) as advance:
        advance.note("3 of 8 layers")
        for _ in range(4):
            clock.now += 2.0
            advance(1)
    bar = progress.stream.getvalue()
    assert "3 of 8 layers, 100 tokens/s, memory" in bar
    assert "ETA" not in bar  # tqdm has its own


def test_file_gets_one_line_per_short_stage():
    progress = Progress(stream=io.StringIO())
    run(progress)
    lines = run(progress, total=1).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("slicing: 3 boundaries in ")
    assert lines[1].startswith("slicing: 1 boundaries in ")


def test_long_stage_gets_a_line_every_half_minute():
    """1,000 steps of 1 s: 10 % take 100 s, so that the half minutes come first."""
    lines = timed(1.0, 1000, tokens=5000)
    assert len(lines) == 1000 // 30 + 1
    first = lines[0].split(", memory")[0]
    assert first == "slicing: 3 % of 1,000 steps, 2 of 100 layers, 5 tokens/s, ETA 16 min 10 s"
    assert lines[-1].startswith("slicing: 1000 steps in 1000.0 s, 5 tokens/s")


def test_minute_long_stage_gets_a_line_every_tenth():
    lines = timed(0.6, 100)
    assert [line.split(" % ")[0] for line in lines[:-1]] == [
        f"slicing: {10 * tenth}" for tenth in range(1, 10)
    ]
    assert "tokens/s" not in lines[0]


def test_no_more_than_a_line_in_five_seconds():
    assert len(timed(0.2, 100)) == 4  # 20 s: after 5, 10 and 15 s, and at the end


def test_resumed_stage_counts_its_own_part():
    """60 of 100 steps are done already: they say nothing about the rate."""
    lines = timed(1.0, 100, tokens=1000, done=60)
    assert lines[0].startswith("slicing: 70 % of 100 steps, 6 of 10 layers, 10 tokens/s, ETA 30 s")
    assert lines[-1].startswith("slicing: 40 steps in 40.0 s, 10 tokens/s")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_says_nothing(stream, caplog):
    caplog.set_level(logging.INFO, "slicegpt.progress")
    progress = Progress(quiet=True, stream=stream())
    assert run(progress) == ""
    progress.say("something")
    assert progress.stream.getvalue() == ""
    assert not caplog.records


def test_failed_stage_claims_nothing():
    progress = Progress(stream=io.StringIO())

    def fail():
        with progress.stage("slicing", 3):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert progress.stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_log_gets_every_line(stream, caplog):
    """Also those that a terminal shows as a bar."""
    caplog.set_level(logging.INFO, "slicegpt.progress")
    progress, clock = Progress(stream=stream()), Clock()
    progress.clock = clock
    with progress.stage("slicing", 4) as advance:
        for _ in range(4):
            clock.now += 31.0
            advance(1)
    progress.warn("the text is small")
    said = [record.message for record in caplog.records]
    assert [line.split(" steps")[0] for line in said[:3]] == [
        f"slicing: {share} % of 4" for share in (25, 50, 75)
    ]
    assert said[3].startswith("slicing: 4 steps in 124.0 s")
    assert said[4] == "warning: the text is small"
    assert "warning: the text is small" in progress.stream.getvalue()


def test_memory():
    now, peak = resident_bytes()
    assert 1e6 < now <= peak  # an interpreter with torch has hundreds of megabytes
    assert re.fullmatch(r"memory \d+\.\d\d GB \(peak \d+\.\d\d GB\)", memory_in_use()[0])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
