"""Self-contained folders, the default: they load where slicegpt is not, and they are the package's own source."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.saved_models import save_dense
from support.sliced_models import sliced
from support.tiny_models import tiny_model, token_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from slicegpt import modeling
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.saving import read_record, save_sliced
from slicegpt.checkpoint.self_contained import AUTO_MAP, MODULES, portable_source, write_modeling_code
from slicegpt.cli import main
from slicegpt.modeling import SlicedConfig, SlicedForSequenceClassification, SlicedModel

# Loads all three classes with slicegpt out of reach, and compares with what the package computed.
SCRIPT = """
import sys
sys.modules["slicegpt"] = None  # importing it raises ImportError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, again = sys.argv[1:]
ids, logits, hidden, tokens = torch.load(folder + "/../expected.pt")
remote = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(folder, **remote).model_type == "slicegpt"
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
assert "transformers_modules" in type(model).__module__, type(model).__module__
with torch.no_grad():
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(AutoModel.from_pretrained(folder, **remote)(ids).last_hidden_state, hidden)
assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
model.save_pretrained(again)
with torch.no_grad():
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again, **remote)(ids).logits, logits)
tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
assert tokenizer("The for statement")["input_ids"]
say = pipeline("text-generation", model=folder, **remote)
assert "transformers_modules" in type(say.model).__module__
assert say("The for statement", max_new_tokens=2, return_full_text=False)
assert not [name for name, module in sys.modules.items() if name.startswith("slicegpt") and module]
"""


@pytest.fixture(scope="module", params=["llama-tied", "opt", "phi"])
def small(request):
    return sliced(tiny_model(request.param, torch.float32, vocab_size=512), 36, dtype=torch.float32)[0]


@torch.no_grad()
def test_loads_and_saves_without_the_package(small, tiny_tokenizer, tmp_path):
    folder, ids = tmp_path / "model", token_ids()
    small.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_modeling_code(folder)
    tokens = small.generate(ids, max_new_tokens=6, do_sample=False)
    expected = (ids, small(ids).logits, small.model(ids).last_hidden_state, tokens)
    torch.save(expected, tmp_path / "expected.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_with_the_package_its_own_classes_are_used(small, tiny_tokenizer, tmp_path, monkeypatch, trust):
    """Nobody is asked whether to trust the folder's code, and it is not run even where that is allowed (lm-eval does).

    transformers asks on the terminal, through `input`.
    """
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("transformers asks whether to trust the code")
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    small.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_modeling_code(folder)
    config = AutoConfig.from_pretrained(folder, **trust)
    assert type(config) is SlicedConfig
    assert config.auto_map == AUTO_MAP
    assert config.boundary_widths == small.config.boundary_widths
    assert type(AutoModelForCausalLM.from_pretrained(folder, **trust)) is type(small)
    assert type(AutoModelForCausalLM.from_config(config, **trust)) is type(small)
    assert type(AutoModel.from_pretrained(folder, **trust)) is SlicedModel
    head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **trust)
    assert type(head) is SlicedForSequenceClassification
    assert AutoTokenizer.from_pretrained(folder, **trust).get_vocab() == tiny_tokenizer.get_vocab()
    assert type(pipeline("text-generation", model=str(folder), **trust).model) is type(small)
    assert not list((tmp_path / "modules").rglob("*_slicegpt.py"))


def test_adapters_of_peft_find_the_package_s_own_class(small, tmp_path, monkeypatch):
    """`AutoPeftModelForCausalLM` loads the base model by the path that its adapters name, and trusts nothing."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("transformers asks whether to trust the code")
    )
    small.save_pretrained(tmp_path / "model")
    write_modeling_code(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.config.name_or_path = str(tmp_path / "model")
    peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    ).save_pretrained(tmp_path / "lora")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert type(adapted.get_base_model()) is type(small)


def test_lm_eval_takes_the_package_s_own_class(small, tiny_tokenizer, tmp_path, monkeypatch):
    """By the folder's name, as its command line does."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("transformers asks whether to trust the code")
    )
    small.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    write_modeling_code(tmp_path)
    model = huggingface.HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32")
    assert type(model.model) is type(small)


@pytest.fixture
def slices(tiny_tokenizer, tmp_path):
    """Slices a tiny model with the command; returns the folder."""
    dense = save_dense(tmp_path / "dense", tiny_tokenizer)

    def run(name: str, *more: str) -> Path:
        size = ["--slice", "0.25", "--round-to", "4", "--nsamples", "4", "--seqlen", "32"]
        data = ["--calibration", "python-reference", "--output", str(tmp_path / name)]
        assert main(["slice", str(dense), *size, *data, *more]) == 0
        return tmp_path / name

    return run


CODE = {f"{name}.py" for name in MODULES.values()}


def code_in(folder: Path) -> set[str]:
    """The modelling code in a folder; config and model card agree with it."""
    found = {file.name for file in folder.glob("*.py")}
    assert ("auto_map" in json.loads((folder / "config.json").read_text())) == bool(found)
    assert ("trust_remote_code=True" in (folder / "README.md").read_text()) == bool(found)
    return found


def test_slice_writes_it_unless_told_not_to(slices, tmp_path):
    folder = slices("sliced")
    assert code_in(folder) == CODE
    assert code_in(slices("without", "--no-self-contained")) == set()
    assert main(["generate", str(folder), "--prompt", "The", "--max-new-tokens", "2"]) == 0

    model, tokenizer = load_dense(str(folder))
    record = read_record(folder)
    assert code_in(save_sliced(model, tokenizer, record, tmp_path / "again")) == CODE
    # The config of a model that came from such a folder names classes: they must not be promised.
    plain = save_sliced(model, tokenizer, record, tmp_path / "plain", self_contained=False)
    assert code_in(plain) == set()
    assert type(load_dense(str(plain))[0]) is type(model)


def test_finetuning_writes_it_unless_told_not_to(slices, tmp_path):
    pytest.importorskip("peft")
    folder = slices("sliced", "--no-self-contained")
    how = [
        "--data",
        "python-reference",
        "--nsamples",
        "4",
        "--seqlen",
        "16",
        "--eval-samples",
        "2",
        "--rank",
        "2",
    ]
    for name, more, code in (("tuned", [], CODE), ("plain", ["--no-self-contained"], set())):
        assert main(["finetune", str(folder), *how, "--output", str(tmp_path / name), *more]) == 0
        assert code_in(tmp_path / name) == code


@pytest.mark.parametrize("module", MODULES)
def test_the_code_is_the_package_s_own(module):
    """Only the names of the sibling modules differ, and nothing of slicegpt is needed besides them."""
    source = Path(modeling.__file__).with_name(f"{module}.py").read_text()
    written = portable_source(module)
    for name, renamed in MODULES.items():
        written = written.replace(f"from .{renamed} import", f"from .{name} import")
    assert written.split("\n", 1)[1] == source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in MODULES
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            )
            assert not any(name.split(".")[0] == "slicegpt" for name in names)


def test_every_module_of_the_network_is_written():
    """What else is in that room is about the network, and no part of it."""
    files = {path.stem for path in Path(modeling.__file__).parent.glob("*.py")} - {"__init__"}
    assert files - {"losses", "random_weights", "sizes", "wide_products"} == set(MODULES)
