"""Folders of a small model that tests may break."""

import shutil
from pathlib import Path

import pytest
from support.checkpoint_folders import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def saved(tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def sharded(tiny_tokenizer, tmp_path) -> Path:
    folder = tmp_path / "sharded"
    tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("transformers was asked to load before the files were checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
