"""Folders in the stock form: what stands in them, that they load without slicegpt, and with what others bring."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.saved_models import save_dense, save_text
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import slicegpt
from slicegpt.checkpoint.partial import PartialFolder
from slicegpt.cli import main
from slicegpt.cli.info import describe
from slicegpt.runtime import Runtime

CHOICES = {
    "keep": 0.85,
    "neurons": 0.2,
    "form": "stock",
    "round_to": 4,
    "nsamples": 6,
    "seqlen": 32,
    "batch_size": 2,
    "ridge": 0.3,
}
# Whoever imports slicegpt, by whatever name, fails.
WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "slicegpt":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.partition(".")[0] == "slicegpt" for name in sys.modules)
torch.save((type(model).__name__, model(torch.tensor([[5, 6, 7, 8]])).logits), sys.argv[2])
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tiny_tokenizer, documents) -> dict:
    """A dense folder, a text, and what slicing it into a folder and in memory gave."""
    root = tmp_path_factory.mktemp("stock")
    dense = save_dense(root / "dense", tiny_tokenizer)
    text = save_text(root / "text.txt", documents)
    common = CHOICES | {"calibration": str(text), "timing": False}
    result = slicegpt.slice(dense, output=root / "small", max_shard_size="100KB", **common)
    model, _, _ = slicegpt.slice(dense, **common)
    return {"folder": root / "small", "report": result.report, "model": model, "root": root}


def test_it_is_a_model_of_the_dense_class(stock):
    loaded = AutoModelForCausalLM.from_pretrained(stock["folder"])
    assert type(loaded) is type(stock["model"]) is LlamaForCausalLM
    assert loaded.config.hidden_size < 48
    assert loaded.config.head_dim == 12
    for name, tensor in stock["model"].state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert not list(stock["folder"].glob("*.py"))
    assert "trust_remote_code" not in (stock["folder"] / "README.md").read_text()
    assert (stock["folder"] / "model.safetensors.index.json").is_file()


def test_it_loads_where_slicegpt_is_not(stock, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT, os.fspath(stock["folder"]), os.fspath(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, logits = torch.load(tmp_path / "out")
    assert name == "LlamaForCausalLM"
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(logits, stock["model"](ids).logits)


@torch.no_grad()
def test_the_runtime_takes_it(stock):
    """Two float32 networks that sum in another order, as in tests/runtime."""
    model, tokenizer = slicegpt.load(stock["folder"])
    ids = tokenizer("The for statement", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(Runtime(model).generate(ids, max_new_tokens=8), expected)


def test_record_info_and_size(stock):
    record = json.loads((stock["folder"] / "slicing.json").read_text())
    files = [load_file(file) for file in stock["folder"].glob("*.safetensors")]
    stored = sum(tensor.numel() for file in files for tensor in file.values())
    facts = describe(os.fspath(stock["folder"]))
    assert record["form"] == facts["form"] == "stock"
    assert record["size"]["parameters"] == facts["parameters"] == stored <= 0.85 * facts["dense_parameters"]
    assert facts["neurons"] == 64
    assert facts["slicing"] > 0
    assert 'form = "stock"' in (stock["folder"] / "recipe.toml").read_text()


def test_lora_attaches(stock):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(stock["folder"])
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in adapted.parameters())


def test_a_run_killed_during_the_exchange_goes_on_from_the_sliced_model(tmp_path: Path):
    partial = PartialFolder(tmp_path / "out")
    partial.enter(resume=False)
    (partial.model / "weights").write_text("sliced")
    folder = partial.folder / "stock"
    folder.mkdir()
    (folder / "weights").write_text("stock")
    partial.exchange(folder)
    assert (partial.model / "weights").read_text() == "stock"
    partial._unlock()
    resumed = PartialFolder(tmp_path / "out")
    resumed.enter(resume=True)
    assert (resumed.model / "weights").read_text() == "sliced"
    resumed.discard()


def test_a_sliced_folder_is_exported(stock, tiny_tokenizer, capsys):
    """One of as many neurons everywhere and no shortcuts gives what slicing into the form gives, bit for bit."""
    root = stock["root"]
    choices = CHOICES | {"calibration": str(root / "text.txt"), "timing": False}
    del choices["keep"]
    choices |= {"slice": 0.0, "held_out": False}
    expected, _, _ = slicegpt.slice(root / "dense", **choices)
    choices |= {"form": "per-layer", "allocate": False}
    slicegpt.slice(root / "dense", output=root / "uniform", **choices)
    folder = os.fspath(root / "uniform")
    assert main(["export", folder, "--form", "stock", "--output", os.fspath(root / "exported")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(root / "exported")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert describe(os.fspath(root / "exported"))["neurons"] == 64
    capsys.readouterr()
    # The other one's class is no sliced one, and cannot become another.
    assert main(["export", os.fspath(root / "small"), "--form", "stock", "--output", "x"]) == 2
    assert "must be a folder that slice wrote, got a llama model" in capsys.readouterr().err
    assert main(["export", folder, "--form", "stock"]) == 2
    assert "--output: a folder to write is needed" in capsys.readouterr().err


def test_gguf_from_the_command_line(stock, capsys):
    pytest.importorskip("gguf")
    file = stock["root"] / "small.gguf"
    command = ["export", os.fspath(stock["folder"]), "--gguf", os.fspath(file)]
    assert main([*command, "--type", "bf16"]) == 0
    assert f"saved: {file} (" in capsys.readouterr().out
    model, _ = slicegpt.load(file)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        # Weights of 8 bits: 2^-9 of each, at random, over some ten products in a row.
        assert (model(ids).logits - stock["model"](ids).logits).norm() < 0.02 * model(ids).logits.norm()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--output", "x"]) == 2
    assert "--output: is for --form" in capsys.readouterr().err
