"""Progress bars and their plain replacement."""

from __future__ import annotations

import io

import pytest

from slicegpt.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress, total: int = 3) -> str:
    with progress.stage("slicing", total, "boundaries") as advance:
        for _ in range(total):
            advance(1)
    return progress.stream.getvalue()


def test_terminal_gets_a_bar():
    output = run(Progress(stream=Terminal()))
    assert "slicing: 100%" in output
    assert "3/3" in output


def test_file_gets_one_line_per_stage():
    progress = Progress(stream=io.StringIO())
    run(progress)
    lines = run(progress, total=1).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("slicing: 3 boundaries in ")
    assert lines[1].startswith("slicing: 1 boundaries in ")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_says_nothing(stream):
    assert run(Progress(quiet=True, stream=stream())) == ""


def test_failed_stage_claims_nothing():
    progress = Progress(stream=io.StringIO())

    def fail():
        with progress.stage("slicing", 3):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert progress.stream.getvalue() == ""
