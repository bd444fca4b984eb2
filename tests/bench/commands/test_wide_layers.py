"""The memory of a run: a random checkpoint that transformers loads, and the plan's estimate beside a process's peak."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slicegpt.bench.commands.wide_layers import (
    config_of,
    measure_model,
    measure_shape,
    run_measured,
    write_checkpoint,
)
from slicegpt.bench.harness.record import Record
from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress

SILENT = Progress(quiet=True)


def small(width: int = 64, neurons: int = 96, vocabulary: int = 128):
    config = config_of("llama-2-70b", 2, width, neurons)
    config.vocab_size = vocabulary
    return config


def test_a_checkpoint_is_what_its_config_says(tmp_path):
    config = small(width=128)
    size = write_checkpoint(tmp_path, config, torch.bfloat16, SILENT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.nbytes for parameter in model.parameters()) == size
    assert model.config.num_key_value_heads == 1
    assert model.model.norm.weight.eq(1).all()
    assert model.model.layers[1].mlp.down_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 128


def test_a_run_that_fails_says_what_it_said():
    with pytest.raises(
        SliceGPTError, match=r"slicegpt slice nowhere --params 0.5 failed: .*output: a folder to write"
    ):
        run_measured(["slice", "nowhere", "--params", "0.5"])
    with pytest.raises(SliceGPTError, match="--shape: must be one of"):
        config_of("llama-9", 2)


def test_the_plan_is_within_15_percent_of_the_peak(tmp_path):
    """Two layers of 4096 neurons, whose Gram matrix, system and panels are half of what the process takes beside its
    imports; neurons are allocated and deleted, λ is fixed."""
    record = Record("memory", {}, torch.device("cpu"), str(tmp_path / "record.json"), None)
    options = ["--keep", "0.8", "--nsamples", "4", "--seqlen", "256", "--batch-size", "1", "--ridge", "0.3"]
    measure_shape(small(512, 4096, 4096), torch.bfloat16, options, tmp_path, record, SILENT)
    row = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["rows"][0]
    assert row["peak_bytes"] > 700e6
    assert row["planned_over_measured"] == pytest.approx(1, abs=0.15)
    assert 0.7 < row["sliced_bytes"] / row["checkpoint_bytes"] < 0.81
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_model_that_is_there(tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    size = write_checkpoint(dense, small(width=256), torch.bfloat16, SILENT)
    record = Record("memory", {}, torch.device("cpu"), str(tmp_path / "record.json"), None)
    size_of = ["--keep", "0.9", "--nsamples", "2", "--seqlen", "32", "--ridge", "0.3"]
    options = [*size_of, "--calibration", "random-tokens", "--no-timing"]
    measure_model(str(dense), options, tmp_path, record, SILENT)
    (row,) = record.rows
    assert (row["model"], row["width"], row["layers"], row["checkpoint_bytes"]) == ("dense", 256, 2, size)
    assert 0 < row["sliced_bytes"] < size
    assert row["peak_bytes"] > 100e6
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "record.json"}
