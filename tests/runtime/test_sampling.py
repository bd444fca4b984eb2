"""Choosing the next token, against transformers' filters and against the probabilities themselves."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from slicegpt.errors import SliceGPTError
from slicegpt.runtime import Sampling


def logits(batch: int = 5, vocabulary: int = 64) -> torch.Tensor:
    return 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0))


def test_greedy():
    assert torch.equal(Sampling().choose(logits().half()), logits().half().argmax(dim=-1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 10, 1.0), (1.5, 0, 0.8), (2.0, 20, 0.6)]
)
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected)
    actual = Sampling(True, temperature, top_k, top_p).filtered(logits())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert torch.allclose(actual.softmax(dim=-1), expected.softmax(dim=-1))


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    assert Sampling(True, top_k=1000).filtered(logits()).isfinite().all()


def test_draws_follow_the_probabilities():
    sampling, count = Sampling(True, top_k=6), 20000
    row = logits(1, 12)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.bincount(sampling.choose(row.expand(count, -1), generator), minlength=12) / count
    probabilities = sampling.filtered(row)[0].softmax(dim=-1)
    assert (drawn[probabilities == 0] == 0).all()
    # five standard deviations of a share of 20000 draws
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((drawn - probabilities).abs() <= 5 * deviation).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature: must be above 0, got 0.0"),
        ({"top_k": -1}, "top_k: must be at least 0, got -1"),
        ({"top_p": 1.5}, r"top_p: must lie in \(0, 1\], got 1.5"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(SliceGPTError, match=message):
        Sampling(do_sample=True, **arguments)
