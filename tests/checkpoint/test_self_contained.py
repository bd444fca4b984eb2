"""`--self-contained` folders: they load where slicegpt is not, and they are the package's own source."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from slicegpt import modeling
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.saving import read_record, save_sliced
from slicegpt.checkpoint.self_contained import AUTO_MAP, MODULES, portable_source, write_modeling_code
from slicegpt.cli import main

# Loads all three classes with slicegpt out of reach, and compares with what the package computed.
SCRIPT = """
import sys
sys.modules["slicegpt"] = None  # importing it raises ImportError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

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
assert not [name for name, module in sys.modules.items() if name.startswith("slicegpt") and module]
"""


@pytest.fixture(scope="module", params=["llama-tied", "opt", "phi"])
def small(request):
    return sliced(tiny_model(request.param, torch.float32), 36, dtype=torch.float32)[0]


@torch.no_grad()
def test_loads_and_saves_without_the_package(small, tmp_path):
    folder, ids = tmp_path / "model", token_ids()
    small.save_pretrained(folder)
    write_modeling_code(folder)
    tokens = small.generate(ids, max_new_tokens=6, do_sample=False)
    expected = (ids, small(ids).logits, small.model(ids).last_hidden_state, tokens)
    torch.save(expected, tmp_path / "expected.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_with_the_package_its_own_classes_are_used(small, tmp_path):
    small.save_pretrained(tmp_path)
    write_modeling_code(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(small)
    assert AutoConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP
    assert (
        json.loads((tmp_path / "config.json").read_text())["boundary_widths"] == small.config.boundary_widths
    )


def test_slice_writes_it_and_saving_again_keeps_it(tiny_tokenizer, tmp_path):
    dense, folder = tmp_path / "dense", tmp_path / "sliced"
    tiny_model("llama", torch.float32, vocab_size=512).save_pretrained(dense)
    tiny_tokenizer.save_pretrained(dense)
    size = ["--slice", "0.25", "--round-to", "4", "--nsamples", "4", "--seqlen", "32"]
    data = ["--calibration", "python-reference", "--self-contained"]
    assert main(["slice", str(dense), "--output", str(folder), *size, *data]) == 0
    written = {f"{name}.py" for name in MODULES.values()}
    assert written <= {file.name for file in folder.iterdir()}
    assert "trust_remote_code=True" in (folder / "README.md").read_text()

    model, tokenizer = load_dense(str(folder))
    again = save_sliced(model, tokenizer, read_record(folder), tmp_path / "again")
    assert written <= {file.name for file in again.iterdir()}
    assert main(["generate", str(again), "--prompt", "The", "--max-new-tokens", "2"]) == 0


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
    assert files - {"losses", "sizes"} == set(MODULES)
