"""A run that is interrupted goes on after its last block, and ends with the same bits; what cannot go on says why."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import bad
from support.saved_models import save_dense, save_text

from slicegpt import api
from slicegpt.checkpoint import kept_run
from slicegpt.checkpoint.partial import is_resumable, partial_path
from slicegpt.checkpoint.tensor_files import TensorFiles
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import Recipe
from slicegpt.step_times import StepTimes

pytestmark = [
    pytest.mark.filterwarnings("ignore:the calibration text is small"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork"),
]

WORKER = Path(__file__).parents[1] / "support" / "killed_runs.py"
CHOICES = {"keep": 0.9, "round_to": 4, "nsamples": 8, "seqlen": 32, "batch_size": 4}
KEPT = CHOICES | {"keep_state": "always", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "train.txt", documents)


@pytest.fixture(scope="module")
def undisturbed(folder, text, tmp_path_factory):
    """The weights of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    api.slice(folder, calibration=text, output=output, keep_state="never", device="cpu", **CHOICES)
    return weights(output)


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


class Interrupted(BaseException):
    """What a test ends a run with."""


def interrupt(monkeypatch, snapshots: int, error: BaseException | None = None) -> None:
    """End the next run after so many snapshots."""
    real, count = kept_run.RunKeeper._write, [0]

    def limited(self, snapshot):
        real(self, snapshot)
        count[0] += 1
        if count[0] == snapshots:
            raise error or Interrupted

    monkeypatch.setattr(kept_run.RunKeeper, "_write", limited)


def interrupted(monkeypatch, folder, text, output, snapshots: int = 12, **changes) -> None:
    """Leave a run into `output` that stopped in the middle: 6 blocks of allocation, then those of slicing."""
    with monkeypatch.context() as patched:
        interrupt(patched, snapshots)
        with pytest.raises(Interrupted):
            api.slice(folder, calibration=text, output=output, **KEPT | changes)
    assert is_resumable(output)
    assert not output.exists()


# --- the same bits ------------------------------------------------------------------------------------------------


def test_killed_at_any_write(folder, text, undisturbed, tmp_path):
    """kill -9 in the middle of a write, in each stage of a run, and again in a resumed one; a seeded choice."""
    generator = random.Random(20)
    arguments = CHOICES | {"model": str(folder), "calibration": str(text), "output": str(tmp_path / "out")}

    def runs(kills: list[list[int]]) -> list[dict]:
        job = json.dumps({"arguments": arguments, "kills": kills})
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER)]
        done = subprocess.run(command, input=job, capture_output=True, text=True, env=environment)
        assert "Traceback" not in done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    (alone,) = runs([[]])
    assert alone["codes"] == [0]
    shutil.rmtree(alone["output"])
    # After which write each stage has its first snapshot, and after which one the next stage has.
    starts = {stage: writes for writes, stage in reversed(alone["snapshots"])}
    stages = ["allocation", "slicing", "ridge"]
    ends = {"allocation": starts["slicing"], "slicing": starts["ridge"], "ridge": alone["writes"]}
    kills = [[generator.randrange(starts[stage], ends[stage]) + 1] for stage in stages]
    kills[0].append(generator.randrange(1, starts["slicing"]))  # once more after it was resumed
    results = runs(kills)
    assert [result["codes"] for result in results] == [[-9, -9, 0], [-9, 0], [-9, 0]]
    assert [result["stages"][0] for result in results] == stages
    for result in results:
        assert weights(Path(result["output"])) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {f"out-{index}" for index in range(3)}


def test_times_of_a_step_are_those_that_the_run_began_with(folder, text, tmp_path, monkeypatch):
    """Measured once: another figure would be another plan."""
    measured, speedup = [], CHOICES | {"keep": None, "target_speedup": 1.1}

    def times(*_):
        measured.append(StepTimes(1e-4 * (1 + len(measured)), 1e-4, 4e-8, 5e-8, 6e-8))
        return measured[-1]

    monkeypatch.setattr("slicegpt.runtime.step_times.measure_step_times", times)
    alone, output = tmp_path / "alone", tmp_path / "out"
    api.slice(folder, calibration=text, output=alone, keep_state="never", device="cpu", **speedup)
    measured.clear()
    interrupted(monkeypatch, folder, text, output, keep=None, target_speedup=1.1)
    api.slice(output=output, resume=True)
    assert len(measured) == 1
    assert weights(output) == weights(alone)
    assert Recipe.read(output).step_times == str(measured[0])


@pytest.mark.parametrize("snapshots", [1, 4, 7, 8, 11, 15])
def test_interrupted_between_blocks(folder, text, undisturbed, tmp_path, monkeypatch, snapshots):
    """After the samples are drawn, in the allocation, at its end, before, in and after slicing."""
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output, snapshots)
    result = api.slice(output=output, resume=True, device="cpu")
    assert weights(output) == undisturbed
    record = result.report.record
    assert len(record["eigenvalues"]) == len(record["boundaries"]) == 7
    assert [entry["block"] for entry in record["refit"]] == list(range(6))
    assert record["ridge_search"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("case", "choices"),
    [
        ("opt", {"slice": 0.25, "orientation": "random", "refit": False}),
        ("phi", {"slice": 0.25, "shortcut": "dense", "ridge": 0.3, "refit_share": 0.5}),
        ("llama-tied", {"slice": 0.25, "dtype": "bfloat16", "calibration": "self"}),
        ("qwen2", {"slice": 0.25, "kv_groups": [1, 0, 2]}),
        ("qwen2-moe", {"slice": 0.25, "neurons": 0.25}),
    ],
)
def test_kinds_of_runs(case, choices, text, tiny_tokenizer, tmp_path, monkeypatch):
    """Random bases, half of the samples fitted, 16 bits, text that the model wrote, heads deleted, experts; in several
    files."""
    folder = save_dense(tmp_path / "dense", tiny_tokenizer, case)
    common = KEPT | {"keep": None, "calibration": text, "max_shard_size": "30KB"} | choices
    text = common.pop("calibration")
    api.slice(folder, calibration=text, output=tmp_path / "whole", **common | {"keep_state": "never"})
    interrupted(monkeypatch, folder, text, tmp_path / "out", 3, **common)
    api.slice(output=tmp_path / "out", resume=True)  # all options are as they were
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("model*")}
    assert len(files) > 2
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("model*")}


def test_killed_when_only_tidying_up_was_left(folder, text, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output, 9)
    state = next(partial_path(output).glob("state-*")).read_bytes()
    api.slice(output=output, resume=True, device="cpu")
    partial_path(output).mkdir()
    (partial_path(output) / "state-000012.safetensors").write_bytes(state)
    (partial_path(output) / "run.json").write_text('{"recipe": {}}')
    result = api.slice(output=output, resume=True, device="cpu")
    assert weights(output) == undisturbed
    assert result.model.config.dense_hidden_size == 48
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_replaced_is_not_lost(folder, text, undisturbed, tmp_path, monkeypatch):
    """Killed between the two renames at the end: the old folder is there again, and the run can go on."""
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output, 9)
    old = partial_path(output) / "replaced"
    old.mkdir()
    (old / "precious").write_text("kept")
    with monkeypatch.context() as patched:
        interrupt(patched, 1)
        with pytest.raises(Interrupted):
            api.slice(output=output, resume=True, overwrite=True, keep_state="always", device="cpu")
    assert (output / "precious").read_text() == "kept"
    api.slice(output=output, resume=True, overwrite=True, device="cpu")
    assert weights(output) == undisturbed


# --- what is kept, and when ---------------------------------------------------------------------------------------


def test_short_runs_keep_nothing(folder, text, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(kept_run.RunKeeper, "_write", lambda self, snapshot: written.append(snapshot))
    api.slice(folder, calibration=text, output=tmp_path / "short", **CHOICES, device="cpu")
    assert not written
    monkeypatch.setattr(kept_run, "KEEP_AFTER", 0.0)
    api.slice(folder, calibration=text, output=tmp_path / "long", **CHOICES, device="cpu")
    plans = json.loads((tmp_path / "long" / "slicing.json").read_text())["plans"]
    trials = sum(plan["measured"] is not None for plan in plans)
    # The samples; 6 blocks, every plan that was tried, and the decision; the embedding, 6 blocks; two or three losses.
    assert 17 <= len(written) - trials <= 18


def test_two_snapshots_at_most_and_only_the_newest_is_needed(
    folder, text, undisturbed, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output, 12)
    _, newer = sorted(partial_path(output).glob("state-*"))
    newer.write_bytes(newer.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{newer.name} is damaged; going on from the state before it"):
        api.slice(output=output, resume=True, device="cpu")
    assert weights(output) == undisturbed
    interrupted(monkeypatch, folder, text, tmp_path / "again", 12)
    for state in partial_path(tmp_path / "again").glob("state-*"):
        state.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(SliceGPTError, match=r"no state in .* can be"),
    ):
        api.slice(output=tmp_path / "again", resume=True, device="cpu")


def test_interrupt_says_what_is_kept(folder, text, undisturbed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    command = ["slice", folder, "--keep", "0.9", "--round-to", "4", "--nsamples", "8", "--seqlen", "32"]
    command += ["--batch-size", "4", "--calibration", text, "--device", "cpu", "--output", output]
    with monkeypatch.context() as patched:
        interrupt(patched, 11, KeyboardInterrupt())
        assert main([*map(str, command), "--keep-state", "always"]) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("interrupted; nothing was written under the final name; what was done is kept in ")
    assert line.endswith("out.partial, --resume goes on with it")
    left_over = bad(capsys, *command)
    assert "out.partial holds an interrupted run into " in left_over
    assert left_over.endswith("--resume goes on with it, --overwrite starts over")
    assert main(["slice", "--output", str(output), "--resume", "--device", "cpu"]) == 0
    assert weights(output) == undisturbed


def test_overwrite_starts_over(folder, text, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output)
    api.slice(folder, calibration=text, output=output, overwrite=True, device="cpu", **CHOICES)
    assert weights(output) == undisturbed


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--keep", "0.8"), "--keep: the run began with 0.9, got 0.8"),
        (("--slice", "0.25"), "--slice: the run began with None, got 0.25"),
        (("--seqlen", "64"), "--seqlen: the run began with 32, got 64"),
        (("--no-refit",), "--refit: the run began with True, got False"),
        (("--dtype", "bfloat16"), "--dtype: the run began with 'auto', got 'bfloat16'"),
        (
            ("--calibration", "python-reference"),
            "--calibration: the run began with '.*train.txt', got 'python-",
        ),
        (("--max-shard-size", "1MB"), "--max-shard-size: the run began with '5GB', got '1000KB'"),
        (("--no-self-contained",), "--self-contained: the run began with True, got False"),
    ],
)
def test_other_options_than_before(folder, text, tmp_path, monkeypatch, capsys, changes, message):
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output, 1)
    line = bad(capsys, "slice", "--output", output, "--resume", "--device", "cpu", *changes)
    assert re.search(message + ".*; --overwrite starts over$", line), line
    assert is_resumable(output)


def test_options_given_again_are_no_others(folder, text, undisturbed, tmp_path, monkeypatch):
    """As given, or as what they meant: dtype auto was float32."""
    output = tmp_path / "out"
    interrupted(monkeypatch, folder, text, output, 1)
    again = CHOICES | {"dtype": "float32", "max_shard_size": "5000MB", "self_contained": True}
    api.slice(folder, calibration=text, output=output, resume=True, device="cpu", **again)
    assert weights(output) == undisturbed


def test_another_model(folder, text, tmp_path, monkeypatch):
    """A file of it that was written anew, and one that is gone."""
    copied, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, copied)
    interrupted(monkeypatch, copied, text, output, 1)
    os.utime(copied / "model.safetensors", (1, 1))
    with pytest.raises(SliceGPTError, match=r"model: .*model.safetensors has changed since the run began"):
        api.slice(output=output, resume=True, device="cpu")
    (copied / "model.safetensors").rename(copied / "elsewhere")
    with pytest.raises(SliceGPTError, match="has no weights"):
        api.slice(output=output, resume=True, device="cpu")


def test_nothing_to_resume(folder, text, tmp_path, capsys):
    line = bad(capsys, "slice", "--output", tmp_path / "out", "--resume")
    assert "--resume: there is no interrupted run into " in line
    with pytest.raises(SliceGPTError, match="resume: needs an output folder"):
        api.slice(folder, resume=True)
    with pytest.raises(SliceGPTError, match="keep_state: must be one of auto, always, never, got 'often'"):
        api.slice(folder, keep=0.9, keep_state="often")


def test_two_runs_into_one_folder(folder, text, tmp_path, monkeypatch):
    output, seen = tmp_path / "out", []

    def second(self, snapshot):
        monkeypatch.undo()
        with pytest.raises(SliceGPTError, match="another run is writing"):
            api.slice(folder, calibration=text, output=output, device="cpu", **CHOICES)
        seen.append(snapshot)

    monkeypatch.setattr(kept_run.RunKeeper, "keep", second)
    api.slice(folder, calibration=text, output=output, device="cpu", **CHOICES)
    assert seen
    assert output.exists()


# --- faults -------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch, name: str) -> None:
    """No more room once a file of this name is written."""
    real = os.pwrite

    def limited(handle, data, at):
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, at)

    monkeypatch.setattr(os, "pwrite", limited)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@needs_proc
def test_full_disk_while_weights_are_written(folder, text, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        full_disk(patched, "fit-0.3.safetensors")
        with pytest.raises(
            SliceGPTError, match=r"no space left while writing .*what was done is kept in .*resume"
        ):
            api.slice(folder, calibration=text, output=output, **KEPT)
    api.slice(output=output, resume=True, device="cpu")
    assert weights(output) == undisturbed
    with monkeypatch.context() as patched:
        full_disk(patched, "model.safetensors")
        with pytest.raises(SliceGPTError, match=r"no space left while writing .*nothing was kept"):
            api.slice(folder, calibration=text, output=tmp_path / "other", device="cpu", **CHOICES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@needs_proc
def test_full_disk_while_the_state_is_written(folder, text, undisturbed, tmp_path, monkeypatch):
    """The run goes on without, for its weights have their room already."""
    full_disk(monkeypatch, "state.writing")
    with pytest.warns(UserWarning, match=r"state cannot be kept .*No space left on device.*goes on without"):
        api.slice(folder, calibration=text, output=tmp_path / "out", **KEPT)
    assert weights(tmp_path / "out") == undisturbed


def test_a_shard_of_the_model_vanishes(folder, text, undisturbed, tmp_path, monkeypatch):
    copied, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, copied)
    real = kept_run.RunKeeper._write

    def vanish(self, snapshot):
        real(self, snapshot)
        if snapshot.stage == "slicing" and snapshot.done == 2:
            (copied / "model.safetensors").rename(tmp_path / "elsewhere")

    monkeypatch.setattr(kept_run.RunKeeper, "_write", vanish)
    gone = r"model.safetensors cannot be read any more: No such file.*; what was done is kept in .*--resume"
    with pytest.raises(SliceGPTError, match=gone):
        api.slice(copied, calibration=text, output=output, **KEPT)
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(copied / "model.safetensors")
    api.slice(output=output, resume=True, device="cpu")
    assert weights(output) == undisturbed


@pytest.mark.parametrize("keep_state", ["always", "never"])
def test_a_disk_that_fails(folder, text, tmp_path, monkeypatch, keep_state):
    """Any other error of the system is one line, too."""
    real = os.pwrite

    def fail(handle, data, at):
        if len(data) == 4 * 48 * 36:  # a query projection
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, data, at)

    monkeypatch.setattr(os, "pwrite", fail)
    kept = "what was done is kept" if keep_state == "always" else "nothing was kept"
    arguments = CHOICES | {"slice": 0.25, "keep": None, "keep_state": keep_state, "device": "cpu"}
    with pytest.raises(SliceGPTError, match=f"out: Input/output error; {kept}"):
        api.slice(folder, calibration=text, output=tmp_path / "out", **arguments)
    assert is_resumable(tmp_path / "out") == (keep_state == "always")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_an_output_folder_on_another_file_system(folder, text, undisturbed, tmp_path, monkeypatch):
    output = Path("/dev/shm") / f"slicegpt-{os.getpid()}" / "out"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    try:
        api.slice(folder, calibration=text, output=output, device="cpu", **CHOICES)
        assert weights(output) == undisturbed
        assert [path.name for path in output.parent.iterdir()] == ["out"]
    finally:
        shutil.rmtree(output.parent)


def test_a_name_that_cannot_be_given(folder, text, tmp_path, monkeypatch):
    """A mount point, or a folder whose permissions have changed: the whole model stays."""
    real = Path.rename

    def fail(self, target):
        if Path(target).name == "out":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SliceGPTError, match=r"which is whole, the name .*out: Device or resource busy"):
        api.slice(folder, calibration=text, output=tmp_path / "out", device="cpu", **CHOICES)
    assert torch.isfinite(api.load(tmp_path / "out.partial/model")[0].get_input_embeddings().weight).all()


def test_files_are_written_through_one_function():
    """Where the worker cuts writes off."""
    assert isinstance(vars(TensorFiles)["_write"], staticmethod)
