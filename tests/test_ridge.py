"""λ of the refit: chosen by what the sliced model loses on held-out windows; and the share of samples it fits to."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.evaluate import window_losses
from slicegpt.families import canonical_fields
from slicegpt.schedule import Shape, constant_widths, plan
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.slicing.ridge import CANDIDATES

OPTIONS = SlicingOptions(dtype=torch.float64, ridge=0.1)
SEARCHED = replace(OPTIONS, ridge=None)
HELD_OUT = token_ids(3, 20, seed=99)


def batches(count: int = 4) -> list[CalibrationBatch]:
    ids = [token_ids(4, 16, seed) for seed in range(count)]
    return [CalibrationBatch(tokens, torch.ones_like(tokens)) for tokens in ids]


def planned(model, width=36):
    fields = canonical_fields(model)
    return plan(fields, constant_widths(fields, width), Shape(round_to=4))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_the_walk_ends_between_worse_neighbours(name):
    """What comes back is the model of a candidate no worse than those beside it, each sliced and judged on its own."""
    model = tiny_model(name)
    config = planned(model)
    sliced, report = slice_model(model, config, batches(), SEARCHED, held_out=HELD_OUT)
    losses = report.ridge_search
    assert list(losses) == sorted(losses)
    assert set(losses) <= set(CANDIDATES)
    best = min(losses, key=losses.get)
    assert {entry["ridge"] for entry in report.refit} == {best}
    place = CANDIDATES.index(best)
    for candidate in CANDIDATES[max(0, place - 1) : place + 2]:
        alone, _ = slice_model(model, config, batches(), replace(OPTIONS, ridge=candidate))
        assert losses[candidate] == sum(window_losses(alone, HELD_OUT)) / (3 * 19) >= losses[best]
        states = sliced.state_dict(), alone.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]) == (candidate == best)


@torch.no_grad()
def test_few_tokens_ask_for_more_ridge():
    """Fewer samples than unknowns against many: the judge sees that the fit to few does not hold elsewhere."""
    model = tiny_model("llama")
    chosen = []
    for count in (1, 40):
        _, report = slice_model(model, planned(model), batches(count), SEARCHED, held_out=HELD_OUT)
        chosen.append(min(report.ridge_search, key=report.ridge_search.get))
    assert chosen[0] > chosen[1]


@torch.no_grad()
@pytest.mark.parametrize(
    "held_out", [None, HELD_OUT[:0], HELD_OUT[:, :1]], ids=["none", "empty", "one token"]
)
def test_nothing_to_judge_by(held_out):
    """The constant of the method is taken, and the report says that nothing was searched."""
    model = tiny_model("llama")
    _, report = slice_model(model, planned(model), batches(), SEARCHED, held_out=held_out)
    assert report.ridge_search is None
    assert {entry["ridge"] for entry in report.refit} == {0.1}


@torch.no_grad()
def test_a_part_of_the_batches_is_fitted_to():
    """The covariances are of all batches, the fit is to the first ones: others behind them do not move it."""
    model = tiny_model("llama")
    config, half = planned(model), replace(OPTIONS, fitted=0.5)
    sliced, report = slice_model(model, config, batches(), half)
    assert report.tokens == 4 * 4 * 16
    whole, _ = slice_model(model, config, batches(), OPTIONS)
    first = "model.embed_tokens.weight"  # its basis comes from the covariance of every batch
    assert torch.equal(sliced.state_dict()[first], whole.state_dict()[first])
    writer = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(sliced.state_dict()[writer], whole.state_dict()[writer])
    # The fraction of the error that is left behind the first block's fit is that of a run with half of the tokens,
    # as far as the basis before it is the same: at full rank of the embeddings both span everything.
    swapped, _ = slice_model(model, config, batches()[:2] + batches()[:1:-1], half)
    gap = (swapped.state_dict()[writer].abs() - sliced.state_dict()[writer].abs()).abs().max()
    assert gap < 1e-8  # the same sums in another order, and eigenvectors up to their signs
