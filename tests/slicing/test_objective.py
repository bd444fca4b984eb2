"""Another objective is one object: token weights, penalty, candidates of λ; all that is fitted follows it."""

import pytest
import torch
from support.objectives import PerColumn, Unweighted
from support.ridge_regression import moments_of, prior_of, problem, stacked_ridge
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.slicing import Objective, SlicingOptions, slice_model
from slicegpt.slicing.regression import fit


@pytest.mark.parametrize("kept", [None, [0, 2, 3, 7, 11]])
@pytest.mark.parametrize("intercept", [False, True])
def test_another_penalty(intercept, kept):
    """λ g² of each column by its own energy, against least squares; the loss of the solution is still its loss."""
    objective, prior = PerColumn(), prior_of(bias=intercept)
    activations, target = problem(200)
    moments = moments_of(activations, target)
    if kept is None:
        centred = activations - activations.mean(dim=0) if intercept else activations
        expected, _ = stacked_ridge(activations, target, 0.1 * centred.square().sum(dim=0), prior)
        # As with the default penalty: the square of the condition number, about 1e4, times 2^-53.
        assert relative_error(fit(objective, moments, 0.1, prior).weight, expected) < 1e-11
    fitted = fit(objective, moments, 0.1, prior, None if kept is None else torch.tensor(kept))
    assert fitted.loss == pytest.approx(objective.loss(moments, fitted), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_weights(dtype):
    """The inverse root of the longer stream's energy; massive tokens do not overflow."""
    before, after = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1e15]])
    weights = Objective().token_weights(before.to(dtype), after.to(dtype), 0.5)
    assert weights.dtype == dtype
    expected = torch.tensor([26.0**-0.5, 1e-15], dtype=torch.float64)
    # A square, an addition and an approximate reciprocal root: a few units of rounding each.
    assert relative_error(weights.double(), expected) < 8 * torch.finfo(dtype).eps


def test_what_a_block_has_to_write():
    dense, carried = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(Objective().target(dense, carried), torch.tensor([2.0, 4.0]))
    assert Objective().target(dense, None) is dense


@torch.no_grad()
def test_neurons_follow_the_objective():
    """Token weights also decide how many neurons each layer keeps, and which."""
    model = tiny_model("llama")
    with torch.no_grad():  # one token whose stream is a hundred times as long as the others'
        model.get_input_embeddings().weight[5] *= 100
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 48), Shape(round_to=4, neurons=0.3))
    options = SlicingOptions(dtype=torch.float64, neuron_multiple=4, ridge=0.1)
    networks = [
        slice_model(model, config, batches(8), options, objective=objective)[0]
        for objective in (Objective(), Unweighted())
    ]
    assert networks[0].config.neurons != networks[1].config.neurons
    assert all(network(token_ids()).logits.isfinite().all() for network in networks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridges": ()}, r"ridges: must be above 0 and ascending, got \(\)"),
        ({"ridges": (0.3, 0.1)}, "ridges: must be above 0 and ascending"),
        ({"ridges": (0.3, 0.3)}, "ridges: must be above 0 and ascending"),
        ({"ridges": (0.0, 0.3)}, "ridges: must be above 0 and ascending"),
        ({"ridges": (0.1, 1.0)}, r"unjudged_ridge: must be one of \(0.1, 1.0\), got 0.3"),
    ],
)
def test_bad_candidates(changes, message):
    with pytest.raises(SliceGPTError, match=message):
        Objective(**changes)
