"""Models that are evaluated layer by layer: when, what is said of it, and the same figures."""

import pytest
from support.command_line import bad
from support.saved_models import save_dense, save_text

from slicegpt import api
from slicegpt.checkpoint import dense_source
from slicegpt.checkpoint.loading import load_dense
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError
from slicegpt.hardware import memory
from slicegpt.progress import Progress

SIZES = {"seqlen": 32, "max_windows": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "test.txt", documents)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(api, "load", refuse)
    monkeypatch.setattr(dense_source, "load_dense", refuse)


def figures(evaluation) -> dict:
    return {name: value for name, value in evaluation.record.items() if name != "seconds"}


@pytest.mark.parametrize("sliced", [False, True])
def test_the_same_figures(sliced, folder, text, tmp_path):
    name = folder
    if sliced:
        name = tmp_path / "sliced"
        api.slice(
            folder, slice=0.25, calibration=text, output=name, round_to=4, nsamples=4, seqlen=32, refit=False
        )
    loaded = api.evaluate(name, data=text, layerwise=False, **SIZES)
    assert figures(api.evaluate(name, data=text, layerwise=True, **SIZES)) == figures(loaded)


def test_larger_than_memory(folder, text, nothing_is_loaded, monkeypatch, capsys):
    """The weights take 375 kB, which with what is computed must be below what is free."""
    model, _ = load_dense(str(folder))
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(memory, "free_memory", lambda device: int(1.19 * size))
    progress = Progress()
    layerwise = api.evaluate(folder, data=text, progress=progress, **SIZES)
    line = f"{folder}: its weights take {size / 1000:.1f} kB in float32, more than is free: evaluated layer by layer"
    assert line in capsys.readouterr().err.splitlines()
    assert layerwise.parameters == sum(parameter.numel() for parameter in model.parameters())
    in_memory = api.evaluate(model, data=text, tokenizer=load_dense(str(folder))[1], **SIZES)
    assert layerwise.perplexity.nll == in_memory.perplexity.nll
    # In half of the bytes it fits, and is loaded.
    with pytest.raises(AssertionError, match="a model was loaded"):
        api.evaluate(folder, data=text, dtype="bfloat16", **SIZES)


def test_a_system_that_does_not_tell_what_is_free_loads(folder, text, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert dense_source.source_if_too_large(str(folder), None, memory.torch.device("cpu")) is None


def test_what_cannot_be_layer_by_layer(folder, text):
    with pytest.raises(SliceGPTError, match="layerwise: tasks need the whole model in memory"):
        api.evaluate(folder, data=text, tasks=FakeTasks(), layerwise=True, **SIZES)
    model, tokenizer = load_dense(str(folder))
    with pytest.raises(SliceGPTError, match="layerwise: is for a model that is not loaded"):
        api.evaluate(model, tokenizer=tokenizer, data=text, layerwise=True, **SIZES)


class FakeTasks(api.ZeroShotTasks):
    def __init__(self):
        pass


def test_command(folder, text, nothing_is_loaded, capsys):
    arguments = ["eval", str(folder), "--data", str(text), "--seqlen", "32", "--max-windows", "2"]
    assert main([*arguments, "--device", "cpu", "--layerwise"]) == 0
    assert "perplexity, layer by layer: 3 layers" in capsys.readouterr().err
    line = bad(capsys, "eval", folder, "--data", text, "--tasks", "piqa", "--layerwise")
    assert "--layerwise is for perplexity" in line
