"""The exchange between structures: against every choice, and the losses that it reads."""

from itertools import product

import pytest
import torch

from slicegpt.slicing.exchange import (
    Structure,
    exchange,
    hull,
    losses_along,
    predicted,
    priced_curve,
)


def structure(losses, unit: int) -> Structure:
    return Structure(range(len(losses) - 1, -1, -1), [float(loss) for loss in losses], unit)


def best_of_all(structures, excess: int) -> float:
    """The least sum of losses of all choices that delete `excess` parameters or more."""
    return min(
        predicted(structures, chosen)
        for chosen in product(*(range(len(own.counts)) for own in structures))
        if sum(own.saved(choice) for own, choice in zip(structures, chosen, strict=True)) >= excess
    )


def gone(structures, chosen) -> int:
    return sum(own.saved(choice) for own, choice in zip(structures, chosen, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_choices(seed):
    """Neurons of three layers and groups of two, convex losses: wherever the size falls on a step, nothing is better;
    in between the excess over the best is at most one step's loss."""
    generator = torch.Generator().manual_seed(seed)

    def convex(steps: int) -> list[float]:
        slopes = torch.rand(steps, generator=generator).cumsum(0) * torch.rand(1, generator=generator)
        return [0.0, *slopes.cumsum(0).tolist()]

    structures = [structure(convex(5), 10) for _ in range(3)] + [structure(convex(3), 70) for _ in range(2)]
    total = sum(own.saved(len(own.counts) - 1) for own in structures)
    for excess in range(5, total, 35):
        chosen = exchange(structures, excess)
        assert gone(structures, chosen) >= excess
        loss = predicted(structures, chosen)
        assert loss == pytest.approx(best_of_all(structures, gone(structures, chosen)), abs=1e-9) or (
            # The last step alone may overshoot.
            loss <= best_of_all(structures, excess) + max(own.losses[-1] for own in structures)
        )
    steps = sorted(slope for own in structures for slope, _ in hull(own))
    at_steps = 0
    for (
        own
    ) in structures:  # sizes that the greedy path passes exactly: what each structure gives up to a slope
        for slope, _ in hull(own):
            taken = [max((end for s, end in hull(each) if s <= slope), default=0) for each in structures]
            loss = predicted(structures, exchange(structures, gone(structures, taken)))
            assert loss == pytest.approx(best_of_all(structures, gone(structures, taken)))
            at_steps += 1
    assert at_steps == len(steps)


def test_never_worse_than_one_currency():
    """Neurons alone, groups alone, and both: the exchange of both is at least as good as either."""
    neurons = [structure([0, 1, 3, 6, 10], 10), structure([0, 2, 5, 9, 14], 10)]
    groups = [structure([0, 3, 20], 25), structure([0, 0.5, 1.5], 25)]
    for excess in range(10, 90, 10):
        both = predicted([*neurons, *groups], exchange([*neurons, *groups], excess))
        for alone in (neurons, groups):
            chosen = exchange(alone, excess)
            if gone(alone, chosen) >= excess:
                assert both <= predicted(alone, chosen) + 1e-12


def test_a_hull_skips_what_is_above_it():
    """A dear step with cheap ones behind it: they are priced together."""
    own = structure([0, 8, 9, 10, 30], 2)
    assert hull(own) == [(10 / 6, 3), (20 / 2, 4)]
    # Alone it stops within the step where that is enough.
    assert exchange([own], 3) == [2]
    assert exchange([own], 2) == [1]
    assert exchange([own], 0) == [0]
    assert exchange([own], 100) == [4]


def test_the_last_step_is_the_cheapest_that_is_enough():
    """One parameter is missing: not the structure whose parameters are cheapest by the dozen gives it."""
    coarse, fine = structure([0, 10], 100), structure([0, 0.5, 1.0], 1)
    assert exchange([coarse, fine], 1) == [0, 1]
    assert exchange([coarse, fine], 50) == [1, 0]


def test_prices_in_the_shape_of_the_objective():
    """At the prices they themselves; between them in proportion to the rise; beyond the last at its rate."""
    curve = [(8, 0.0), (6, 1.0), (4, 3.0), (2, 7.0), (1, 11.0)]
    found = dict(priced_curve(curve, {6: 0.1, 2: 0.4}))
    assert found == pytest.approx({8: 0, 6: 0.1, 4: 0.1 + 0.3 * 2 / 6, 2: 0.4, 1: 0.4 + 0.3 * 4 / 6})
    # A price that falls is noise; a block whose objective does not rise has the shape of a step.
    assert [loss for _, loss in priced_curve(curve, {6: 0.2, 2: 0.1})] == pytest.approx(
        [0, 0.2, 0.2, 0.2, 0.2]
    )
    assert [loss for _, loss in priced_curve([(2, 0.0), (1, 0.0)], {1: 0.3})] == [0.0, 0.3]


def test_losses_by_exponent():
    """0: the prices; 1: the rises, scaled to the prices' sum; 1/2: the geometric mean of these two."""
    curves = [[(4, 0.0), (2, 10.0)], [(4, 0.0), (2, 30.0)]]
    prices = [{2: 0.3}, {2: 0.1}]
    ends = {
        exponent: [curve[-1][1] for curve in losses_along(curves, prices, exponent)]
        for exponent in (0.0, 0.5, 1.0)
    }
    assert ends[0.0] == pytest.approx([0.3, 0.1])
    assert ends[1.0] == pytest.approx([0.1, 0.3])
    assert ends[0.5] == pytest.approx([(0.3 * 0.1) ** 0.5] * 2)
    assert all(curve[0][1] == 0 for curve in losses_along(curves, prices, 0.5))
