"""The text of a run that names none: the hub's where it can be had, else one that needs no network, and a notice."""

import importlib.util
import json
import sys
import types
import warnings

import pytest
from huggingface_hub import constants
from support.saved_models import save_dense

from slicegpt import api
from slicegpt.calibration import defaults
from slicegpt.calibration.documents import load_documents
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe

SMALL = ["--nsamples", "4", "--seqlen", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer)


@pytest.fixture
def offline(monkeypatch):
    """No hub, whatever is installed and whatever network there is."""

    def load(name, split="train", column=None):
        if name == "wikitext2":
            raise SliceGPTError("the Hugging Face hub did not give wikitext2", "spec")
        return load_documents(name, split, column)

    monkeypatch.setattr(defaults, "check_hub", lambda name: None)
    monkeypatch.setattr(defaults, "load_documents", load)


def test_the_published_text_where_it_is_there(monkeypatch):
    asked = []
    monkeypatch.setattr(defaults, "check_hub", lambda name: None)
    monkeypatch.setattr(defaults, "load_documents", lambda name, split: asked.append((name, split)))
    quiet = Progress(quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert defaults.default_calibration(quiet) == defaults.default_test(quiet) == "wikitext2"
    assert asked == [("wikitext2", "train"), ("wikitext2", "test")]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("choose", "name", "notice"),
    [
        (defaults.default_calibration, "self", "calibrating on text that the model writes itself"),
        (
            defaults.default_test,
            "python-reference",
            "compare models with each other and with no published figure",
        ),
    ],
)
def test_what_needs_no_network(choose, name, notice):
    message = f"the Hugging Face hub did not give wikitext2.*{notice}"
    with pytest.warns(UserWarning, match=message):
        assert choose(Progress(quiet=True)) == name


@pytest.mark.usefixtures("offline")
def test_slice_with_its_defaults(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["slice", str(folder), "--keep", "0.9", *SMALL, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert "no text was named, and wikitext2 cannot be had" in captured.err
    assert "asked 90.0 %" in captured.out
    recipe = Recipe.read(output)
    assert recipe.calibration == "self"  # so that it repeats where the hub is
    assert recipe.round_to == 8
    record = json.loads((output / "slicing.json").read_text())
    assert [source["name"] for source in record["calibration"]["sources"]] == ["self"]


@pytest.mark.usefixtures("offline")
def test_eval_with_its_defaults(folder, tmp_path, capsys):
    file = tmp_path / "eval.json"
    options = ["--seqlen", "32", "--windows", "2", "--json", str(file)]
    assert main(["eval", str(folder), *options]) == 0
    assert "evaluating on Python's language reference" in capsys.readouterr().err
    found = json.loads(file.read_text())
    assert (found["data"], found["tokens"]) == ("python-reference", 2 * 31)
    with pytest.warns(UserWarning, match="evaluating on Python's language reference"):
        again = api.evaluate(folder, seqlen=32, max_windows=2, device="cpu")
    assert again.perplexity.perplexity == found["perplexity"]


def test_a_text_that_was_named_is_not_replaced(folder, tmp_path, monkeypatch, capsys):
    """Whoever asks for a data set gets it, or an error."""
    from slicegpt.calibration import mixture

    def refuse(name, split, column=None):
        raise SliceGPTError("no network", "spec")

    monkeypatch.setattr(mixture, "load_documents", refuse)
    options = ["--calibration", "wikitext2:4,self:1", "--output", str(tmp_path / "out")]
    assert main(["slice", str(folder), "--keep", "0.9", *SMALL, *options]) == 2
    assert "no network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- is the hub there? ---


@pytest.fixture
def lonely(monkeypatch, tmp_path):
    """`datasets` is installed, its cache is empty, and no connection can be opened; returns the addresses tried."""
    tried = []

    def refuse(address, timeout):
        tried.append(address)
        raise OSError("no route")

    config = types.SimpleNamespace(HF_DATASETS_CACHE=str(tmp_path))
    module = types.ModuleType("datasets")
    module.config = config
    module.__spec__ = importlib.util.spec_from_loader("datasets", loader=None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(defaults.socket, "create_connection", refuse)
    monkeypatch.setattr(defaults, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    return tried


def test_a_hub_that_cannot_be_reached(lonely, monkeypatch):
    with pytest.raises(SliceGPTError, match=r"hub\.example cannot be reached: no route"):
        defaults.check_hub("wikitext2")
    monkeypatch.setattr(constants, "ENDPOINT", "http://mirror.example:8080")
    with pytest.raises(SliceGPTError, match=r"mirror\.example cannot be reached"):
        defaults.check_hub("wikitext2")
    assert lonely == [("hub.example", 443), ("mirror.example", 8080)]


def test_what_the_cache_holds_needs_no_hub(lonely, tmp_path):
    (tmp_path / "Salesforce___wikitext").mkdir()
    defaults.check_hub("wikitext2")
    assert len(lonely) == 1


def test_the_library_is_asked_where_only_it_knows(lonely, monkeypatch):
    monkeypatch.setattr(defaults, "getproxies", lambda: {"https": "http://proxy.example"})
    defaults.check_hub("wikitext2")
    monkeypatch.setattr(defaults, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    defaults.check_hub("wikitext2")
    assert lonely == []
