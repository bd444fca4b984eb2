"""Classifiers and question answering on a sliced trunk: loaded, trained, saved, and loaded again."""

import subprocess
import sys

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import relative_error, tiny_model, token_ids
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from slicegpt.checkpoint.self_contained import write_modeling_code

# Auto class, its arguments, labels of three rows of twelve tokens.
HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"num_labels": 4}, {"labels": torch.tensor([0, 3, 1])}),
    "token": (AutoModelForTokenClassification, {"num_labels": 4}, {"labels": token_ids() % 4}),
    "answer": (
        AutoModelForQuestionAnswering,
        {},
        {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 2, 11])},
    ),
}
# The trunk of a head sliced with `slice_head` gives D columns through a projection; without a tie, the last width.
TRUNKS = [("llama", False), ("llama-tied", True), ("opt", False), ("phi", True)]


@pytest.fixture(scope="module", params=TRUNKS, ids=lambda trunk: f"{trunk[0]}-{trunk[1]}")
def causal(request):
    case, slice_head = request.param
    return sliced(tiny_model(case, torch.float32), 36, dtype=torch.float32, slice_head=slice_head)[0]


def scores(outputs) -> torch.Tensor:
    return outputs.logits if "logits" in outputs else torch.stack((outputs.start_logits, outputs.end_logits))


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_causal_folder_gives_the_trunk_which_trains_and_comes_back(causal, head, tmp_path):
    auto, arguments, labels = HEADS[head]
    causal.save_pretrained(tmp_path / "causal")
    model, report = auto.from_pretrained(tmp_path / "causal", output_loading_info=True, **arguments)
    ids = token_ids()
    assert all(name.startswith(("score", "qa_outputs")) for name in report["missing_keys"])
    with torch.no_grad():
        expected = causal.model(ids).last_hidden_state
        assert torch.equal(model.model(ids).last_hidden_state, expected)

    loss = model.train()(ids, **labels).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.numel()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.eval()
    with torch.no_grad():
        assert model(ids, **labels).loss < loss or head == "token"  # whose dropout is part of the first loss
        model.save_pretrained(tmp_path / "trained")
        again = auto.from_pretrained(tmp_path / "trained")
        assert type(again) is type(model)
        assert torch.equal(scores(again(ids)), scores(model(ids)))


@torch.no_grad()
def test_a_sequence_is_scored_at_its_last_token(causal):
    """What stands after it is padding, and changes nothing."""
    config = causal.config.__class__.from_dict(causal.config.to_dict() | {"num_labels": 3})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = token_ids(2)
    padded = torch.cat((ids, torch.zeros(2, 4, dtype=torch.long)), dim=1)
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    assert logits.shape == (2, 3)
    expected = model.score(model.model(ids).last_hidden_state[:, -1])
    assert relative_error(logits, expected) < 1e-5  # rows of another number: other kernels, float32 rounding


SCRIPT = """
import sys
sys.modules["slicegpt"] = None  # importing it raises ImportError
import torch, transformers

folder, again, auto = sys.argv[1:]
ids, hidden = torch.load(folder + "/../expected.pt")
remote = {"trust_remote_code": True}
model = getattr(transformers, auto).from_pretrained(folder, **remote).eval()
assert "transformers_modules" in type(model).__module__, type(model).__module__
with torch.no_grad():
    assert torch.equal(model.model(ids).last_hidden_state, hidden)
    model.save_pretrained(again)
    other = getattr(transformers, auto).from_pretrained(again, **remote).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
"""


@torch.no_grad()
@pytest.mark.parametrize("head", sorted(HEADS))
def test_self_contained_folders_carry_the_heads(head, tmp_path, monkeypatch):
    causal, ids = sliced(tiny_model("llama-tied", torch.float32), 36, dtype=torch.float32)[0], token_ids()
    causal.save_pretrained(tmp_path / "causal")
    write_modeling_code(tmp_path / "causal")
    torch.save((ids, causal.model(ids).last_hidden_state), tmp_path / "expected.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = [str(tmp_path / "causal"), str(tmp_path / "again")]
    command = [sys.executable, "-c", SCRIPT, *folders, HEADS[head][0].__name__]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
