"""What several sizes of one model share: the slices are those that each would be alone, bit for bit."""

import pytest
import torch
from support.tiny_models import tiny_model

import slicegpt.slicing.propagation
from slicegpt import api
from slicegpt.slicing import Reuse, plans, reuse

pytestmark = pytest.mark.filterwarnings("ignore:the calibration text is small")

SMALL = {"round_to": 4, "nsamples": 8, "seqlen": 32, "device": "cpu", "timing": False}


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return tiny_model("llama-tied", torch.float32, vocab_size=len(tiny_tokenizer) + 24)


@pytest.fixture
def counts(monkeypatch):
    """How often each of the shared things was computed."""
    found = {"costs": 0, "streams": 0}
    costs = plans.deletion_costs
    made = Reuse.stream

    def counted_costs(*arguments):
        found["costs"] += 1
        return costs(*arguments)

    def counted_stream(self, key, make):
        def counted():
            found["streams"] += 1
            return make()

        return made(self, key, counted)

    monkeypatch.setattr(plans, "deletion_costs", counted_costs)
    monkeypatch.setattr(slicegpt.slicing.propagation.Reuse, "stream", counted_stream)
    return found


def slices(model, tokenizer, documents, shared, sizes=(0.95, 0.9)):
    return [
        api.slice(model, tokenizer=tokenizer, keep=size, calibration=documents, reuse=shared, **SMALL)
        for size in sizes
    ]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        left, right = one.model.state_dict(), other.model.state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert one.report.record["calibration"] == other.report.record["calibration"]


def test_shared_slices_are_those_made_alone(model, tiny_tokenizer, documents, counts):
    alone = slices(model, tiny_tokenizer, documents, None)
    assert counts == {"costs": 2, "streams": 0}
    shared = slices(model, tiny_tokenizer, documents, Reuse())
    assert_same(alone, shared)
    assert counts["costs"] == 3
    assert counts["streams"] == 6  # three layers, two blocks each, one batch: once for both sizes


def test_other_tokens_begin_anew(model, tiny_tokenizer, documents):
    shared = Reuse()
    others = [document[::-1] for document in documents]
    slices(model, tiny_tokenizer, others, shared, (0.9,))
    assert_same(
        slices(model, tiny_tokenizer, documents, shared, (0.9,)),
        slices(model, tiny_tokenizer, documents, None, (0.9,)),
    )


def test_another_model_begins_anew(model, tiny_tokenizer, documents):
    other = tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer) + 24)
    shared = Reuse()
    slices(other, tiny_tokenizer, documents, shared, (0.9,))
    assert_same(
        slices(model, tiny_tokenizer, documents, shared, (0.9,)),
        slices(model, tiny_tokenizer, documents, None, (0.9,)),
    )


def test_streams_are_kept_only_where_memory_allows(model, tiny_tokenizer, documents, counts, monkeypatch):
    monkeypatch.setattr(reuse, "free_memory", lambda device: 0)
    scarce = slices(model, tiny_tokenizer, documents, Reuse())
    assert counts["streams"] == 12
    monkeypatch.undo()
    assert_same(scarce, slices(model, tiny_tokenizer, documents, None))
