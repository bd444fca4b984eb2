"""bench/gpu.sh, with a stand-in for Python: failures, needs, what is kept, and an archive that a kill leaves whole."""

import shutil
import subprocess
import sys
import tarfile

import pytest
from support.builds import ROOT, environment, needs_sources, stand_in

from slicegpt.bench.commands import rehearsal
from slicegpt.bench.commands.gpu_summary import lines
from slicegpt.table import write_json

pytestmark = [needs_sources, pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")]

# What a step writes and takes: nothing is measured.
WORKS = 'for last; do previous=$target; target=$last; [ "$previous" = --json ] && echo "{}" >"$last"; done; sleep 0.05'


@pytest.fixture
def call(tmp_path):
    """A function from a phase, the stand-in's script and steps to (exit status, step -> state, what was printed)."""

    def run(phase, script, *steps, **variables):
        python = stand_in(tmp_path / "python", f'case "$*" in {script} esac\n{WORKS}')
        env = environment(PYTHON=str(python), SLICEGPT_GPU_WORK=str(tmp_path / "work"), **variables)
        command = ["bash", ROOT / "bench" / "gpu.sh", "--rehearse", tmp_path / "out", str(phase), *steps]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        files = rehearsal.archived(tmp_path / "out" / f"gpu-{phase}.tar.gz")
        summary = files[f"summary-{phase}.txt"].decode().splitlines()
        states = {line.split()[0]: line.split(" s  ", 1)[1] for line in summary if " s  " in line}
        return done.returncode, states, done.stdout

    return run


def test_a_failed_step_stops_what_needs_it_and_nothing_else(call, tmp_path):
    failing = "*smoke_gram*|*token_7b_0.json*) echo broken; exit 1 ;;"
    # Steps that need a GPU are stand-ins, which do not fail: the one that fails writes its state itself.
    status, states, printed = call(1, failing)
    assert status == 1
    assert states["token_7b_0"] == "failed"
    assert states["ceilings"] == states["bench_gram"] == states["token_7b_25"] == "ok"
    assert "broken" in printed
    (steps,) = (tmp_path / "work").glob("*/steps")
    (steps / "smoke_gram").write_text("failed")
    for name in ("bench_gram", "bench_gram_heavy", "token_7b_0"):
        (steps / name).unlink()
    status, states, _ = call(1, "nothing) ;;", "bench_gram", "bench_gram_heavy", "token_7b_0", "layers_7b")
    assert status == 1
    assert states["bench_gram"] == states["bench_gram_heavy"] == "not run: smoke_gram failed"
    assert states["token_7b_0"] == "ok"
    assert states["layers_7b"] == "ok, before"


def test_no_step_begins_without_time(call):
    status, states, _ = call(2, "nothing) ;;", "tune", "bench_rotation", SLICEGPT_GPU_SECONDS="3")
    assert status == 1
    assert set(states.values()) == {"not run: no time left"}


@pytest.mark.parametrize("phase", rehearsal.PHASES)
def test_archive_holds_every_step_after_kills(tmp_path, monkeypatch, phase):
    """Killed at random moments: every step that has ended is in the archive, and the phase can go on."""
    python = stand_in(tmp_path / "python", WORKS)
    monkeypatch.setattr(sys, "executable", str(python))
    generator = rehearsal.random.Random(phase)
    rows = rehearsal.rehearse([phase], 2, 3.0, generator)
    assert rows[-1]["status"] == 0
    assert all(row["lost"] == 0 for row in rows)
    assert rows[-1]["steps"] >= 12


def test_a_broken_archive_is_noticed(tmp_path):
    """The check itself: an archive cut in half, a step without its log, and none at all."""
    archive = tmp_path / "gpu-1.tar.gz"
    assert rehearsal.missing_of(archive, {"build": "ok"}) == ["there is no archive, but 1 steps have ended"]
    (tmp_path / "build").write_text("ok\n")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "build", "steps/build")
    assert rehearsal.missing_of(archive, {"build": "ok"}) == ["build: no log"]
    assert rehearsal.missing_of(archive, {"build": "failed"})[0].startswith("build: 'failed' on disk")
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises((EOFError, tarfile.ReadError)):
        rehearsal.archived(archive)


def test_gpu_script_needs_a_folder_a_phase_and_a_device(tmp_path):
    script = ["bash", ROOT / "bench" / "gpu.sh"]
    for arguments in ([], [tmp_path], [tmp_path, "4"]):
        done = subprocess.run([*script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("Everything that needs a GPU, in three calls")
    env = environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([*script, tmp_path, "1"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench/gpu.sh: torch finds no CUDA device\n"


def test_summary_puts_figures_beside_ceilings(tmp_path):
    ceiling = {"ceiling": "copy", "value": 4000.0, "unit": "GB/s", "reason": None}
    row = {"network": "dense", "engine": "fused", "ms_median": 4.0, "gigabytes_per_second": 3000.0}
    token = {"benchmark": "token", "complete": False, "ceilings": {"copy, GB/s": 4000.0}, "rows": [row]}
    write_json(tmp_path / "ceilings.json", {"benchmark": "ceilings", "rows": [ceiling]})
    write_json(tmp_path / "token.json", token)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[]")
    found = {line["step"]: line for line in lines(tmp_path)}
    assert found["ceilings"]["figure"] == "4000 GB/s"
    assert found["token"]["ceiling"] == "0.75 of copy"
    assert found["token"]["state"] == "incomplete"
    assert found["broken"]["what"] == "not readable"
    assert "other" not in found
