"""The refit's ridge regression against a stacked least-squares problem."""

import pytest
import torch
from support.ridge_regression import in_columns, moments_of, prior_of, problem, stacked_ridge
from support.tiny_models import relative_error

from slicegpt.slicing import deletion
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.regression import fit, solution

OBJECTIVE = Objective()


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_fit_is_the_stacked_least_squares_solution(ridge, intercept):
    activations, target = problem(200)
    keep, prior = torch.arange(200) % 5 != 2, prior_of(bias=intercept)
    fitted = fit(OBJECTIVE, moments_of(activations, target, keep), ridge, prior)
    weight, bias = stacked_ridge(activations[keep], target[keep], ridge, prior)
    # Normal equations lose the square of the condition number, about 1e4 here, times 2^-53.
    assert relative_error(fitted.weight, weight) < 1e-11
    if intercept:
        assert relative_error(fitted.bias, bias) < 1e-11
    else:
        assert fitted.bias is None


@pytest.mark.parametrize("kept", [None, [0, 2, 3, 7, 11]])
@pytest.mark.parametrize("intercept", [False, True])
def test_loss_is_that_of_the_tokens(intercept, kept):
    """The quadratic form in the moments of other tokens, against their residuals themselves; and what the fit
    says of its own."""
    own, kept = moments_of(*problem(200)), None if kept is None else torch.tensor(kept)
    fitted = fit(OBJECTIVE, own, 0.1, prior_of(bias=intercept), kept)
    assert fitted.loss == pytest.approx(OBJECTIVE.loss(own, fitted), rel=1e-10)
    activations, target = problem(90, seed=1)
    residuals = target - activations @ fitted.weight
    if intercept:
        residuals = residuals - fitted.bias
    loss = OBJECTIVE.loss(moments_of(activations, target), fitted)
    assert loss == pytest.approx(residuals.square().sum().item(), rel=1e-10)


def test_a_system_that_is_not_positive_definite_is_solved_in_its_range(caplog):
    """Cholesky fails on a singular matrix; the eigenvalues' pseudoinverse still solves a consistent system."""
    basis = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    system = basis @ torch.diag(torch.tensor([5.0, 3, 2, 1]).double()) @ basis.T - 1e-20 * torch.eye(9)
    right = system @ torch.ones(9, 2).double()

    class Singular(Objective):
        def normal_equations(self, *arguments):
            return in_columns(system), in_columns(right)

    solved = solution(Singular(), None, 0.1, None, None)
    assert "taking the pseudoinverse" in caplog.text
    assert relative_error(system @ solved, right) < 1e-12
    inverse, solved = deletion.solved(lambda: (in_columns(system), in_columns(right)))
    assert relative_error(system @ solved, right) < 1e-12
    assert relative_error(system @ inverse @ system, system) < 1e-12
