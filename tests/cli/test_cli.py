"""The command line end to end on a small model: results, JSON names, and one clear line for bad input."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.command_line import bad
from support.saved_models import save_dense, save_text
from support.tiny_models import relative_error, tiny_model, token_ids
from transformers import AutoModelForCausalLM

import slicegpt.checkpoint.folders
import slicegpt.checkpoint.saving
from slicegpt.cli import main

SAMPLES = ["--nsamples", "8", "--seqlen", "32", "--calibration"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A dense model with a tokenizer, as a user has it."""
    path = tmp_path_factory.mktemp("dense") / "model"
    return save_dense(path, tiny_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "train.txt", documents)


@pytest.fixture(scope="module")
def result(folder, text, tmp_path_factory):
    """A folder written by `slicegpt slice`, and its JSON."""
    output = tmp_path_factory.mktemp("sliced") / "small"
    report = output.with_suffix(".json")
    arguments = ["slice", str(folder), "--slice", "0.25", "--round-to", "4", *SAMPLES, str(text)]
    assert main([*arguments, "--output", str(output), "--json", str(report)]) == 0
    return output, json.loads(report.read_text())


def test_slice_writes_a_whole_folder(result):
    output, report = result
    names = {path.name for path in output.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "slicing.json", "README.md"}
    assert expected | {"tokenizer.json"} <= names
    record = json.loads((output / "slicing.json").read_text())
    assert record["size"] == report["size"]
    assert len(record["eigenvalues"]) == len(record["boundaries"]) == 7
    assert len(record["calibration"]["sha256"]) == 64
    assert "slicegpt" in (output / "README.md").read_text()
    assert not list(output.parent.glob(".*.partial"))


def test_info_counts_what_is_stored(result, folder, tmp_path, capsys):
    output, _ = result
    assert main(["info", str(output), "--boundaries", "--json", str(tmp_path / "info.json")]) == 0
    facts = json.loads((tmp_path / "info.json").read_text())
    with safe_open(output / "model.safetensors", "pt") as tensors:
        elements = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert facts["parameters"] == elements
    assert facts["bytes"] == 4 * elements
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert facts["dense_parameters"] == sum(parameter.numel() for parameter in dense.parameters())
    assert [boundary["width"] for boundary in facts["boundaries"]] == [36] * 6 + [48]
    assert all(boundary["rank"] <= 48 - boundary["width"] for boundary in facts["boundaries"])
    assert {boundary["shortcut"] for boundary in facts["boundaries"][:-1]} == {"compact"}
    assert f"{elements:,}" in capsys.readouterr().out


def test_info_of_a_dense_model(folder, tmp_path):
    assert main(["info", str(folder), "--json", str(tmp_path / "info.json")]) == 0
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["parameters"] == facts["dense_parameters"]
    assert facts["removed"] == facts["slicing"] == 0


def test_eval_side_by_side(result, folder, text, tmp_path, capsys):
    output, _ = result
    file = tmp_path / "eval.json"
    arguments = [
        "eval",
        str(folder),
        str(output),
        "--data",
        str(text),
        "--seqlen",
        "64",
        "--max-windows",
        "6",
    ]
    assert main([*arguments, "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    assert facts["tokens"] == 6 * 63
    assert facts["perplexity"] == facts["models"][0]["perplexity"] != facts["models"][1]["perplexity"]
    assert "against first" in capsys.readouterr().out


def test_generate(result, tmp_path, capsys):
    output, _ = result
    file = tmp_path / "generate.json"
    arguments = ["generate", str(output), "--prompt", "The for statement", "--max-new-tokens", "6"]
    assert main([*arguments, "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    assert facts["tokens"] <= 6
    assert facts["text"].strip() in capsys.readouterr().out
    assert main([*arguments, "--sample", "--temperature", "0.7", "--seed", "1"]) == 0


def test_env(capsys, tmp_path):
    assert main(["env", "--json", str(tmp_path / "env.json")]) == 0
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert "backend" in facts["kernels"]
    assert torch.__version__ in capsys.readouterr().out


def test_same_seed_same_files(folder, text, result, tmp_path):
    output, _ = result
    arguments = ["slice", str(folder), "--slice", "0.25", "--round-to", "4", *SAMPLES, str(text)]
    assert main([*arguments, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "size", [("--keep", "0.9"), ("--target-bytes", "2.5e5"), ("--slice", "0.3"), ("--widths", None)]
)
@pytest.mark.parametrize("shape", [(), ("--shortcut", "dense"), ("--orientation", "pca", "--slice-head")])
def test_sizes_and_shapes(folder, text, tmp_path, size, shape):
    if size[0] == "--widths":
        (tmp_path / "widths.json").write_text("[36, 40, 40, 32, 40, 44, 48]")
        size = ("--widths", str(tmp_path / "widths.json"))
    output, file = tmp_path / "out", tmp_path / "out.json"
    arguments = [
        "slice",
        str(folder),
        *size,
        "--round-to",
        "4",
        *shape,
        *SAMPLES,
        str(text),
        "--json",
        str(file),
    ]
    assert main([*arguments, "--output", str(output)]) == 0
    report = json.loads(file.read_text())["size"]
    if size[0] == "--keep":
        assert report["parameters"] <= 0.9 * report["dense_parameters"]
    if size[0] == "--target-bytes":
        assert report["bytes"] <= 2.5e5
    if shape[:2] == ("--shortcut", "dense"):
        kinds = {b["shortcut"] for b in json.loads((output / "slicing.json").read_text())["boundaries"][:-1]}
        assert kinds == {"dense"}


def test_variable_lengths_and_bfloat16(folder, tmp_path):
    lines = [json.dumps({"body": "word " * length}) for length in (40, 9, 25, 60, 3, 17, 33, 12)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = [
        "slice",
        str(folder),
        "--slice",
        "0.25",
        "--round-to",
        "4",
        *SAMPLES,
        str(tmp_path / "data.jsonl"),
    ]
    more = [
        "--text-column",
        "body",
        "--varied-seqlen",
        "--dtype",
        "bfloat16",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, *more]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_full_width_is_the_dense_model(folder, text, tmp_path):
    arguments = ["slice", str(folder), "--slice", "0", *SAMPLES, str(text), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    with torch.no_grad():
        dense, same = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out"))
        ids = token_ids()
        assert relative_error(same(ids).logits, dense(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (("--slice", "0.25"), 80),  # the paper's percentage: columns alone
        (("--slice", "0.25", "--neurons", "0.2", "--no-allocate"), 64),
        (("--slice", "0.25", "--neurons", "0.2"), None),
        (("--slice", "0.25", "--shortcut", "dense", "--neurons", "0.2"), None),
        (("--keep", "0.9", "--neurons", "0"), 80),
        (("--keep", "0.9", "--no-refit"), 80),
        (("--keep", "0.9"), None),
    ],
)
def test_neurons(folder, text, tmp_path, options, left, capsys):
    """A true size is reached by deleting neurons, too; otherwise only where they are asked for. None: layers differ."""
    arguments = ["slice", folder, *options, "--round-to", "4", *SAMPLES, text, "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    assert main(["info", str(tmp_path / "out"), "--json", str(tmp_path / "info.json")]) == 0
    shown = capsys.readouterr().out
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["dense_neurons"] == 80
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    card = (tmp_path / "out/README.md").read_text()
    assert ("and MLP neurons" in card) == (left != 80)
    if left:
        assert facts["neurons"] == left
        assert stored == [left] * len(stored)
        return
    assert facts["neurons"] == stored
    assert min(stored) < max(stored)
    assert all(number % 4 == 0 for number in stored)
    for text_shown in (shown, card):
        assert f"{min(stored)} to {max(stored)}, {round(sum(stored) / len(stored))} on average" in text_shown


@pytest.mark.parametrize(
    ("ridge", "chosen"), [((), True), (("--ridge", "auto"), True), (("--ridge", "0.3"), False)]
)
def test_ridge_is_chosen_unless_given(folder, text, tmp_path, ridge, chosen):
    """The record says what each candidate lost."""
    out = tmp_path / "out"
    arguments = ["slice", folder, "--slice", "0.25", "--round-to", "4", *SAMPLES, text, *ridge]
    assert main([str(argument) for argument in (*arguments, "--output", out)]) == 0
    record = json.loads((out / "slicing.json").read_text())
    assert (record["ridge_search"] is not None) == chosen
    best = min(record["ridge_search"], key=record["ridge_search"].get) if chosen else "0.3"
    assert {str(entry["ridge"]) for entry in record["refit"]} == {best}


# --- bad input: one line, exit code 2, nothing written -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--slice", "1.0"), r"--slice: must lie in \[0, 1\), got 1.0"),
        (("--slice", "-0.25"), "got -0.25"),
        (("--slice", "nan"), "got nan"),
        (("--slice", "0.9"), "--slice: boundary 0 .* less than one attention head"),
        (("--keep", "0"), r"--keep: must lie in \(0, 1\], got 0.0"),
        (("--keep", "0.1"), "--keep: .* cannot be reached"),
        (("--target-bytes", "nan"), "--target-bytes"),
        (("--widths", "no/such.json"), "--widths: cannot read"),
        (
            ("--slice", "0.25", "--neurons", "1"),
            r"--neurons: must lie in \[0, 1\) or be auto, got 1.0",
        ),
        (("--slice", "0.25", "--neurons", "0.5", "--no-refit"), "--neurons: .*got 0.5 without it"),
        (("--slice", "0.25", "--ridge", "0.1", "--no-refit"), "--ridge: needs the output refit, got 0.1"),
        (("--slice", "0.25", "--refit-share", "0.5", "--no-refit"), "--refit-share: needs the output refit"),
        (("--slice", "0.25", "--refit-share", "0"), r"--refit-share: must lie in \(0, 1\], got 0"),
        (
            ("--slice", "0.25", "--nsamples", "100000"),
            "--nsamples: 100000 samples of 32 tokens need 3,200,000 tokens",
        ),
        (
            ("--slice", "0.25", "--orientation", "pca", "--shortcut", "compact"),
            "--orientation: compact shortcuts need",
        ),
        (("--slice", "0.25", "--device", "cuda:77"), "--device: cuda:77 is not there"),
        (("--slice", "0.25", "--device", "tpu9"), "--device: expected cpu or cuda"),
    ],
)
def test_bad_options(folder, text, tmp_path, capsys, changes, message):
    output = tmp_path / "out"
    base = ["--round-to", "4", "--nsamples", "8", "--seqlen", "32", "--calibration", text, "--output", output]
    assert_error(bad(capsys, "slice", folder, *base, *changes), message)
    assert not list(tmp_path.iterdir())


def assert_error(line: str, message: str) -> None:
    import re

    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x00\xff\xfe binary \x80\x81" * 50, "text"),
        (b"too short", "8 samples of 32 tokens"),
    ],
)
def test_bad_text(folder, tmp_path, capsys, content, message):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    assert_error(
        bad(
            capsys,
            "slice",
            folder,
            "--slice",
            "0.25",
            "--round-to",
            "4",
            *SAMPLES,
            file,
            "--output",
            tmp_path / "o",
        ),
        message,
    )
    assert_error(bad(capsys, "eval", folder, "--data", file, "--seqlen", "64"), "empty|text|window")
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


def slice_into(folder: Path, text: Path, output: Path) -> list:
    return ["slice", folder, "--slice", "0.25", "--round-to", "4", *SAMPLES, text, "--output", output]


def test_existing_output(folder, text, result, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    assert_error(
        bad(capsys, *slice_into(folder, text, output)),
        "--output: .*exists already; choose another folder, or overwrite it",
    )
    assert (output / "precious").read_text() == "kept"
    assert main([*map(str, slice_into(folder, text, output)), "--overwrite"]) == 0
    assert not (output / "precious").exists()
    assert (output / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_that_is_read_is_not_replaced(folder, text, tmp_path, capsys):
    """Neither by its own name, nor by another one, nor by that of a folder around it."""
    model = tmp_path / "models" / "model"
    shutil.copytree(folder, model)
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "link", model.parent, model / ".." / "model"):
        line = bad(capsys, *slice_into(model, text, output), "--overwrite")
        assert_error(line, "--output: .* would replace the model")
    assert {path.name for path in model.iterdir()} == {path.name for path in folder.iterdir()}


def test_generating_beyond_what_the_model_has(tiny_tokenizer, tmp_path, capsys):
    """Tokens and learned positions; and a prompt that is no text, as invalid bytes on a command line arrive."""
    tiny_model("opt", torch.float32, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path)
    for runtime in ("plain", "fused"):
        generate = ["generate", tmp_path, "--runtime", runtime, "--prompt"]
        assert_error(
            bad(capsys, *generate, "use <tool>"), "token 512, and the model's embedding table 512 rows"
        )
        assert_error(
            bad(capsys, *generate, "a", "--max-new-tokens", "64"), "beyond the model's 64 learned positions"
        )
        assert_error(bad(capsys, *generate, "a\udcff"), "--prompt: the prompt is not Unicode text")


def test_truncated_safetensors(folder, text, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_error(bad(capsys, *slice_into(broken, text, tmp_path / "out")), "model.safetensors: truncated")
    assert_error(bad(capsys, "info", broken), "model.safetensors: truncated")
    assert not (tmp_path / "out").exists()


def test_unsupported_architecture(tiny_tokenizer, text, tmp_path, capsys):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=16, n_head=2, vocab_size=512))
    model.save_pretrained(tmp_path / "bloom")
    tiny_tokenizer.save_pretrained(tmp_path / "bloom")
    line = bad(capsys, *slice_into(tmp_path / "bloom", text, tmp_path / "out"))
    assert_error(line, "'bloom' is not supported: .*ALiBi; supported are llama, .*opt, phi,")
    assert not (tmp_path / "out").exists()


def test_non_finite_activations(tiny_tokenizer, text, tmp_path, capsys):
    model = tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    line = bad(capsys, *slice_into(tmp_path / "broken", text, tmp_path / "out"))
    assert_error(line, r"NaN or infinity in the stream after layer 1 \(attention\)")
    assert not (tmp_path / "out").exists()


def test_no_space_before_slicing(folder, text, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(slicegpt.checkpoint.folders.shutil, "disk_usage", lambda _: usage)
    assert_error(bad(capsys, *slice_into(folder, text, tmp_path / "out")), "--output: no space left")
    assert not list(tmp_path.iterdir())


def test_no_space_while_writing(folder, text, tmp_path, capsys, monkeypatch):
    """The disk fills up after the weights and before the rest: all of it goes."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slicegpt.checkpoint.saving, "write_json", fail)  # after the weights, before the card
    assert_error(
        bad(capsys, *slice_into(folder, text, tmp_path / "out")),
        "no space left while writing.*nothing was kept",
    )
    assert not list(tmp_path.iterdir())


def test_killed_run_leaves_nothing_under_the_final_name(folder, text, tmp_path):
    """SIGKILL while the files are being written: the name never appears."""
    script = """
import sys, time
import slicegpt.checkpoint.saving
def slow(*_):
    print("writing", flush=True)
    time.sleep(60)
slicegpt.checkpoint.saving.write_json = slow
from slicegpt.cli import main
main(sys.argv[1:])
"""
    arguments = list(map(str, slice_into(folder, text, tmp_path / "out")))
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        while "writing" not in (line := process.stdout.readline()):
            assert line or process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()


def test_unwritable_parent(folder, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_error(
        bad(capsys, *slice_into(folder, text, tmp_path / "file" / "out")), "--output: cannot make the folder"
    )


def test_missing_model(text, tmp_path, capsys):
    assert_error(
        bad(capsys, *slice_into("no/such/model/here", text, tmp_path / "out")),
        "does not exist|no local folder",
    )


def test_empty_prompt(result, capsys):
    assert_error(bad(capsys, "generate", result[0], "--prompt", "x", "--chat"), "no chat template")
    assert_error(
        bad(capsys, "generate", result[0], "--prompt", "x", "--sample", "--temperature", "0"), "--temperature"
    )
