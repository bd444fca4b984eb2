"""`slicegpt bench` on the command line: bad arguments, interruption, models by folder."""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from slicegpt.cli import main
from slicegpt.errors import SliceGPTError

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick_peaks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token"], "--model, --shape: one of them is needed, and not both"),
        (["token", "--shape", "gpt-5"], "--shape: must be one of smollm2-135m"),
        (["token", "--shape", "llama-1b", "--engines", "vllm"], "--engines: must be among hf"),
        (["token", "--shape", "llama-1b", "--slice", "0.5", "--engines", "hf"], "--engines: none of hf runs"),
        (["token", "--shape", "llama-1b", "--json", "nowhere/x.json"], "--json: cannot write nowhere/x.json"),
        (
            ["token", "--shape", "llama-1b", "--plot", "x.gif"],
            "--plot: expected a file that ends in .png or .svg",
        ),
        (
            ["token", "--shape", "llama-1b", "--tokens", "4000"],
            "4029 tokens are beyond the 2048 positions of dense",
        ),
        (["throughput", "--shape", "llama-1b", "--seqlen", "4000"], "--seqlen: 4000 tokens are beyond"),
        (["layers", "--shape", "llama-1b", "--slice", "0.99"], "less than one attention head"),
        (["slicing"], "--model, --shape: one of them is needed"),
        (["report", "nowhere"], "DIR: expected a folder of results, got nowhere"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_interrupted_run_keeps_what_it_measured(tiny_folder, tmp_path):
    file = tmp_path / "token.json"
    command = [sys.executable, "-m", "slicegpt", "bench", "token", "--model", str(tiny_folder), "--engines"]
    command += [
        "hf,fused",
        "--slice",
        "0,0.5",
        "--round-to",
        "8",
        "--tokens",
        "3000",
        "--rounds",
        "1000",
        "--json",
        str(file),
        "--csv",
        f"{file}.csv",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell started in the background have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 600  # importing alone takes minutes on a busy machine
        while not os.path.exists(f"{file}.csv") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    content = json.loads(file.read_text())
    assert content["complete"] is False
    # Of the cases that have begun, each: the first round may still be on its way through the others.
    rows = content["rows"]
    assert rows
    assert {row["engine"] for row in rows} <= {"hf", "fused"}
    assert 0 < rows[0]["tokens"] < 3000
    assert os.path.exists(f"{file}.csv")
    assert "This run is incomplete." in printed
    assert f"interrupted: {len(rows)} row" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "interrupted", "calls", "kept"),
    [
        (["throughput", "--engines", "fused", "--seqlen", "16"], "throughput.BatchProber.decode", 3, 1),
        (["layers", "--seqlen", "8"], "layers.time_whole", 20, 5),
        (
            ["slicing", "--shape", "smollm2-135m", "--nsamples", "2", "--seqlen", "16"],
            "slicing_time.slice_model",
            1,
            2,
        ),
    ],
)
def test_other_benchmarks_keep_what_they_measured(
    arguments, interrupted, calls, kept, tiny_folder, tmp_path, monkeypatch, capsys
):
    """Ctrl-C at a certain call, in the middle of each."""
    target, file = f"slicegpt.bench.commands.{interrupted}", tmp_path / "out.json"
    monkeypatch.setattr("slicegpt.bench.commands.layers.SAVE_SECONDS", 0.0)
    count = 0

    def counted(*given, **named):
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return wrapped(*given, **named)

    wrapped = pkgutil.resolve_name(target.replace(".BatchProber", ":BatchProber"))
    monkeypatch.setattr(target, counted)
    if "--shape" not in arguments:
        arguments = [*arguments, "--model", str(tiny_folder), "--slice", "0,0.5"]
    with pytest.raises(SystemExit, match="130"):
        main(["bench", *arguments, "--round-to", "8", "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["complete"] is False
    assert len(content["rows"]) == kept
    printed = capsys.readouterr()
    assert "This run is incomplete." in printed.out
    assert f"interrupted: {kept} rows are kept" in printed.err


@pytest.mark.parametrize(
    ("device", "asked", "engines"),
    [
        ("cpu", [], "hf,fused"),
        ("cuda", [], "hf,hf-compile,fused"),
        ("cuda", ["--engines", "fused"], "fused"),
    ],
)
def test_engines_of_throughput_depend_on_the_device(device, asked, engines, tiny_networks, monkeypatch):
    (network,) = tiny_networks((0.0,))
    network.device = torch.device(device)
    seen = []

    def choose(names):
        seen.append(",".join(names))
        raise SliceGPTError("enough")

    monkeypatch.setattr("slicegpt.cli.benchmark.networks_of", lambda options: [network])
    monkeypatch.setattr("slicegpt.bench.models.engines.chosen_engines", choose)
    assert main(["bench", "throughput", "--shape", "llama-1b", *asked]) == 2
    assert seen == [engines]


def test_sliced_folder_is_measured_as_it_is(tiny_networks, tiny_folder, tiny_tokenizer, tmp_path, capsys):
    (network,) = tiny_networks((0.5,))
    folder = tmp_path / "sliced-half"
    network.canonical().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    file = tmp_path / "token.json"
    arguments = [
        "--model",
        str(tiny_folder),
        str(folder),
        "--slice",
        "0",
        "--engines",
        "hf,fused",
        "--tokens",
        "4",
    ]
    assert main(["bench", "token", *arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["network"], row["engine"]) for row in rows] == [
        ("dense", "hf"),
        ("dense", "fused"),
        ("sliced-half", "fused"),
    ]
    assert rows[2]["slice"] == 0.5
    assert all(row["speedup"] > 0 for row in rows)
