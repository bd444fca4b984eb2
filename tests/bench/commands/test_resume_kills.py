"""`bench.commands.resume_kills`: when it kills, and what it says of that; the runs themselves are stand-ins."""

import json
import random
import sys

import pytest

from slicegpt.bench.commands import resume_kills


def test_a_moment_in_each_part():
    found = resume_kills.moments(20.0, 5, random.Random(1))
    assert [int(moment // 4) for moment in found] == [0, 1, 2, 3, 4]
    assert found == resume_kills.moments(20.0, 5, random.Random(1))


class Run:
    """A run that takes 10 s, 2 of them before its first snapshot, and whose weights depend on how often it died."""

    begun, gap, start = 2.0, 0.5, 0.0
    deaths: list[float] = []  # noqa: RUF012
    weights = "as ever"

    def __init__(self, arguments, output):
        self.output = output

    def wait(self, seconds=None):
        if seconds is not None:
            self.deaths.append(seconds)
            return True
        self.output.mkdir()
        (self.output / "model.safetensors").write_text(self.weights if self.deaths else "as ever")
        return False


@pytest.mark.parametrize("weights", ["as ever", "others"])
def test_what_is_reported(monkeypatch, tmp_path, capsys, weights):
    monkeypatch.setattr(resume_kills, "Run", Run)
    monkeypatch.setattr(Run, "deaths", [])
    monkeypatch.setattr(Run, "weights", weights)
    monkeypatch.setattr(resume_kills.time, "monotonic", lambda: 10.0)
    file = tmp_path / "kills.json"
    command = ["resume_kills", "--kills", "5", "--kills-a-run", "3", "--work", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", [*command, str(file)])
    assert resume_kills.main() == (weights == "others")
    printed = capsys.readouterr().out
    assert f"5 kills, {5 * (weights == 'others')} of them in runs that ended with other weights" in printed
    facts = json.loads(file.read_text())
    moments = [row["killed after"] for row in facts["kills"]]
    assert [int(moment // (10 / 3)) for moment in moments[:3]] == [0, 1, 2]
    assert [int(moment // 5) for moment in moments[3:]] == [0, 1]
    # A process that resumes needs its 2 s before it stands where the one before it died.
    assert Run.deaths[0] == pytest.approx(moments[0], abs=0.01)
    assert Run.deaths[1] == pytest.approx(2 + moments[1] - max(2, moments[0]), abs=0.02)
    assert {row["same weights"] for row in facts["kills"]} == {weights == "as ever"}
    assert [path.name for path in tmp_path.iterdir()] == ["kills.json"]
