"""Second moments of tokens: in batches, weighted, and in the precisions that are fast."""

import pytest
import torch
from support.ridge_regression import SUMS, moments_of, prior_of, problem
from support.tiny_models import relative_error

from slicegpt.slicing.moments import JoinedBatches, Moments
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.regression import fit

OBJECTIVE = Objective()


def test_joined_batches_lose_no_token():
    activations, target = problem(200)
    weight = 1 + torch.arange(200).double() % 3
    at_once = Moments([12], 7, torch.device("cpu"))
    at_once.add(activations, target, weight)
    calls = []

    class Counted(Moments):
        def add(self, activations, target, weight=None):
            calls.append(len(activations))
            super().add(activations, target, weight)

    joined = Counted([12], 7, torch.device("cpu"))
    batches = JoinedBatches(joined, tokens_per_call=50)
    for rows in torch.arange(200).split(17):
        batches.add(activations[rows], target[rows], weight[rows])
    assert batches.finish() is joined
    assert calls == [51, 51, 51, 47]  # three batches of 17 make 50; the rest is what `finish` adds
    batches.finish()
    assert sum(calls) == 200
    for name in SUMS:
        # Two orders of 200 float64 additions.
        assert relative_error(getattr(joined, name), getattr(at_once, name)) < 400 * 2.0**-53


@pytest.mark.parametrize("intercept", [False, True])
def test_a_token_of_weight_three_is_three_tokens(intercept):
    activations, target = problem(80)
    counts = torch.arange(80) % 4
    weighted = Moments([12], 7, torch.device("cpu"))
    for rows in torch.arange(80).split(17):
        weighted.add(activations[rows], target[rows], counts[rows].double())
    repeated = moments_of(activations.repeat_interleave(counts, 0), target.repeat_interleave(counts, 0))
    for name in SUMS:
        assert relative_error(getattr(weighted, name), getattr(repeated, name)) < 1e-13
    prior = prior_of(bias=intercept)
    fits = [fit(OBJECTIVE, moments, 0.1, prior) for moments in (weighted, repeated)]
    assert relative_error(fits[0].weight, fits[1].weight) < 1e-11
    assert OBJECTIVE.loss(weighted, fits[0]) == pytest.approx(OBJECTIVE.loss(repeated, fits[1]), rel=1e-10)


@pytest.mark.parametrize("halves", [False, True])
def test_float32_moments(halves, monkeypatch):
    """Against float64, as float32 products and as those of bfloat16; the fit is the same but for what is averaged."""
    monkeypatch.setattr("slicegpt.slicing.moments.has_fast_bfloat16", lambda device: halves)
    activations, target = problem(4000)
    weight = torch.rand(4000, generator=torch.Generator().manual_seed(3)).double() + 0.1
    exact, moments = (Moments([12], 7, torch.device("cpu")) for _ in range(2))
    exact.add(activations, target, weight)
    moments.add(activations.float(), target.float(), weight.float())
    for name, right in (("gram", activations), ("cross", target)):
        magnitudes = activations.abs().mT @ (weight[:, None] * right.abs())
        # Each operand is rounded to 8 bits (2^-9 of it at most), or both and the weight to 24; then 4000 float32 sums.
        bound = (2 * 2.0**-9 + 2.0**-18 if halves else 4 * 2.0**-24) + 4097 * 2.0**-24
        assert ((getattr(moments, name) - getattr(exact, name)).abs() <= bound * magnitudes).all()
    fits = [fit(OBJECTIVE, sums, 0.1, prior_of(bias=True)) for sums in (exact, moments)]
    # Independent roundings of 4000 tokens: some 2^-9 / sqrt(4000) of a weight; ten times that.
    limit = 10 * 2.0**-9 / 4000**0.5 if halves else 1e-5
    assert relative_error(fits[1].weight, fits[0].weight) < limit
