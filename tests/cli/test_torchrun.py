"""`torchrun -m slicegpt ...`: one process prints and writes, a dead one ends the job with one line."""

import functools
import json
import time
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file
from support.command_line import bad
from support.saved_models import save_text
from support.tiny_models import relative_error, tiny_model
from support.torchrun import torchrun

from slicegpt.cli import main, sharing

HERE = Path(support.__path__[0])
# The model is of float64: sums over 768 tokens in another order differ by 768 · 2^-53 = 1e-13 at most. Relative gaps of
# 1e-4 between eigenvalues and systems of condition 1e3 amplify that, block after block, as tests/slicing/test_ranks.py
# derives it. A batch that is left out or counted twice changes weights by a tenth.
TOLERANCE = 1e-8
SLICE = ["--params", "0.85", "--round-to", "4", "--nsamples", "24", "--seqlen", "32", "--batch-size", "4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each of the ranks has: then what they compute alike has the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_tokenizer):
    """The folder of a dense tiny model, made once."""

    @functools.cache
    def folder(case: str) -> Path:
        path = tmp_path_factory.mktemp("dense") / case
        tiny_model(case, torch.float64, vocab_size=len(tiny_tokenizer)).save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def folder(folder_of):
    return folder_of("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "train.txt", documents)


def command(folder, text, output) -> list:
    calibration = f"{text}:3,self:1"
    return ["slice", folder, "--output", output, "--calibration", calibration, "--device", "cpu", *SLICE]


def own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("slicegpt slice: ")]


def test_slice_and_eval(folder, text, tmp_path, capsys):
    """Two ranks give the model of one; the text that the model writes is the same, too."""
    assert main(list(map(str, command(folder, text, tmp_path / "one")))) == 0
    log = tmp_path / "run.log"
    done = torchrun(2, "-m", "slicegpt", *command(folder, text, tmp_path / "two"), "--log-file", log)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity, held out") == 1  # one table, of one rank
    assert done.stderr.count("slicing: ") == 1
    records = [json.loads((tmp_path / name / "slicing.json").read_text()) for name in ("one", "two")]
    assert records[0]["calibration"]["sha256"] == records[1]["calibration"]["sha256"]
    assert records[0]["neurons"] == records[1]["neurons"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        if weight.numel():
            assert relative_error(two[name], weight) < TOLERANCE, name
    lines = log.read_text().splitlines()
    assert any("slicing: " in line for line in lines)
    assert lines[-1].endswith(" done")

    evaluate = ["eval", folder, tmp_path / "two", "--data", text, "--seqlen", "32", "--max-windows", "7"]
    evaluate += ["--device", "cpu", "--json", tmp_path / "eval.json"]

    def perplexities() -> list[float]:
        return [each["perplexity"] for each in json.loads((tmp_path / "eval.json").read_text())["models"]]

    assert main(list(map(str, evaluate))) == 0
    alone = perplexities()
    done = torchrun(2, "-m", "slicegpt", *evaluate)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1
    assert perplexities() == alone  # bit for bit: the same windows, each in a batch of its own


@pytest.mark.parametrize(("case", "dead", "later"), [("llama", 0, 3), ("qwen2-moe", 1, 1)])
def test_killed_rank_ends_the_job_and_another_number_resumes(folder_of, text, tmp_path, case, dead, later):
    folder = folder_of(case)
    assert main(list(map(str, command(folder, text, tmp_path / "one")))) == 0
    undisturbed = load_file(tmp_path / "one" / "model.safetensors")
    begin, output = time.monotonic(), tmp_path / "out"
    arguments = [*command(folder, text, output), "--keep-state", "always"]
    done = torchrun(2, HERE / "dying_rank_worker.py", dead, "SIGKILL", *arguments)
    assert done.returncode != 0
    lines = own_lines(done.stderr)
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("slicegpt slice: error: ")
    assert "a rank has died" in lines[0]
    assert lines[0].endswith(f"what was done is kept in {output}.partial, --resume goes on with it")
    assert "Traceback" not in done.stderr.split(lines[0])[0]
    assert not output.exists()
    assert time.monotonic() - begin < 240  # no rank waits for one that is gone; the start is most of it

    done = torchrun(later, "-m", "slicegpt", "slice", "--output", output, "--resume", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "sampling the model" not in done.stderr  # it did not begin anew
    weights = load_file(output / "model.safetensors")
    for name, weight in undisturbed.items():
        if weight.numel():
            assert relative_error(weights[name], weight) < TOLERANCE, name


def test_bad_input_is_told_once(folder, text, tmp_path):
    arguments = [*command(folder, text, tmp_path / "out"), "--nsamples", "100000"]
    done = torchrun(2, "-m", "slicegpt", *arguments)
    assert done.returncode != 0
    (line,) = own_lines(done.stderr)
    assert line.startswith("slicegpt slice: error: ")
    assert "--nsamples: " in line


@pytest.mark.parametrize("arguments", [("info", "there"), ("generate", "there", "--prompt", "x")])
def test_commands_of_one_process_refuse(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sharing, "_chosen", True)  # as a command before left it that failed in its work
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    line = bad(capsys, *arguments)
    assert line.endswith(
        "one process does it, and 2 were started together: start it without torchrun (WORLD_SIZE=2)"
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(list(arguments)) == 2
    assert capsys.readouterr().err == ""  # the other one says it


def test_tasks_are_not_shared(folder, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "--tasks: cannot be shared out among 2 processes" in bad(capsys, "eval", folder, "--tasks", "piqa")
