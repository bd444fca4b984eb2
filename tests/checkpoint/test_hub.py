"""Publishing on the hub: the folder arrives whole, with its card, and loads from there."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from support.hub_stand_in import HubStandIn
from support.sliced_models import sliced
from support.tiny_models import tiny_model

from slicegpt.checkpoint.record import size_record, slicing_fraction
from slicegpt.checkpoint.saving import save_sliced
from slicegpt.cli import main
from slicegpt.modeling.sizes import boundary_report


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that huggingface_hub takes for the hub, logged in; it reads its settings once, when imported."""
    with HubStandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
        server.shutdown()
        close_session()


@pytest.fixture(scope="module")
def model():
    return sliced(tiny_model("llama-tied", torch.float32), 36, dtype=torch.float32)[0]


def record_of(model) -> dict:
    """As much of `slicing.json` as a card needs."""
    config = model.config
    return {
        "source": "tiny-llama",
        "dtype": "float32",
        "dense_width": config.dense_hidden_size,
        "neurons": config.intermediate_size,
        "dense_neurons": config.dense_intermediate_size,
        "slicing": slicing_fraction(config),
        "size": size_record(config, torch.float32),
        "boundaries": boundary_report(config),
        "calibration": {"tokens": 384, "source": "random", "seed": 0},
    }


@pytest.mark.parametrize("stored_with_code", [False, True])
@pytest.mark.parametrize("self_contained", [False, True])
def test_push(hub, model, tmp_path, capsys, self_contained, stored_with_code):
    """With or without the modelling code, whichever the folder has."""
    folder = save_sliced(model, None, record_of(model), tmp_path / "small", self_contained=stored_with_code)
    option = [] if self_contained else ["--no-self-contained"]
    assert main(["push", str(folder), "someone/small-25", "--private", *option]) == 0
    assert "/someone/small-25/commit/" in capsys.readouterr().out
    assert hub.private == {"someone/small-25": True}
    stored = hub.files["someone/small-25"]
    as_wanted = save_sliced(model, None, record_of(model), tmp_path / "wanted", self_contained=self_contained)
    assert set(stored) == {file.name for file in as_wanted.iterdir()}
    for name in set(stored) - {"README.md"}:
        assert stored[name] == (as_wanted / name).read_bytes()
    card = stored["README.md"].decode()
    assert 'from_pretrained("someone/small-25"' in card
    assert ("trust_remote_code=True" in card) == ("modeling_slicegpt.py" in stored) == self_contained
    assert f"{record_of(model)['size']['parameters']:,}" in card


def test_push_of_a_folder_that_names_code_and_does_not_hold_it(hub, model, tmp_path):
    """As transformers' `save_pretrained` leaves it."""
    folder = save_sliced(model, None, record_of(model), tmp_path / "small")
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
    for file in folder.glob("*_slicegpt.py"):
        file.unlink()
    assert main(["push", str(folder), "someone/small"]) == 0
    stored = hub.files["someone/small"]
    assert {name: stored[name] for name in set(stored) - {"README.md"}} == whole


# transformers keeps its client of the hub: this one is a process of its own.
PUSH_AND_LOAD = """
import sys, torch, slicegpt
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("someone/small")
again = AutoModelForCausalLM.from_pretrained("someone/small")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
"""


def test_transformers_own_push_and_load(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "small")
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", PUSH_AND_LOAD, str(tmp_path / "small")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stored = hub.files["someone/small"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(stored)
    assert "- slicegpt" in stored["README.md"].decode()  # the tag that the hub searches by


def test_refusals_are_one_line(hub, model, tmp_path, monkeypatch, capsys):
    folder = save_sliced(model, None, record_of(model), tmp_path / "small")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(folder), "someone/small"]) == 2
    error = capsys.readouterr().err
    assert "USER/NAME: the hub did not take 'someone/small'" in error
    assert len(error.strip().splitlines()) == 1
    assert not hub.files

    assert main(["push", str(tmp_path / "nothing"), "someone/small"]) == 2
    assert "is no folder" in capsys.readouterr().err
    (folder / "slicing.json").unlink()
    assert main(["push", str(folder), "someone/small"]) == 2
    assert "has no slicing.json" in capsys.readouterr().err
