"""What to give up of what: the plan that reaches a size at the least predicted loss.

Every block can give up some of its structures (MLP neurons), at a loss that its price and its objective predict; the
network as a whole can give up columns, at the price of a width. At each width that is considered, the rest is taken
from the blocks: along the lower convex hulls of their losses, the cheapest step of all first, until the size is
reached. The width with the least sum of losses is best.

A block's loss is `KL^(1-e) (c rise)^e`: the price (`slicegpt.slicing.prices`) and the rise of the block's own
objective, which `c` brings to the same sum. The price alone (e = 0) knows what an error does to the logits, in a
network whose other blocks are whole; but prices do not add up where much is taken from all, and then the objective,
which counts every block's errors alike, is the better half. Which exponent is best depends on the size: plans of
several are measured (`slicegpt.slicing.trials`, docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# [(what remains, loss or rise there)], from all on.
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Structure:
    """What one block can give up, in steps.

    Attributes:
        counts: that may remain, descending; the first is all.
        losses: predicted at each of them; 0 at the first, and never falling.
        size: of one unit: the parameters that it stores, or the seconds of a step that it takes.
    """

    counts: Sequence[int]
    losses: Sequence[float]
    size: float

    def saved(self, choice: int) -> float:
        """The size that is gone with the count number `choice`."""
        return (self.counts[0] - self.counts[choice]) * self.size


def exchange(structures: Sequence[Structure], excess: float) -> list[int]:
    """The choice of a count for every structure, so that a size of `excess` is gone, at the least sum of losses.

    Cheapest steps first, along the convex hulls: the best choice of all that delete as much or more, but for
    the last step. There every structure is asked for what is missing, and the cheapest one gives it.

    Returns:
        Indices into `counts`; all of them the last ones where even these do not suffice.
    """
    steps = sorted(
        (slope, number, end) for number, structure in enumerate(structures) for slope, end in hull(structure)
    )
    chosen = [0] * len(structures)
    for _, number, end in steps:
        if excess <= 0:
            break
        last = structures[number].saved(end) - structures[number].saved(chosen[number]) >= excess
        if last:
            number, end = _last_step(structures, chosen, excess)
        excess -= structures[number].saved(end) - structures[number].saved(chosen[number])
        chosen[number] = end
    return chosen


def hull(structure: Structure) -> list[tuple[float, int]]:
    """`[(loss by size, choice)]`: the steps from corner to corner of the lower convex hull, cheapest first."""
    corners, losses, saved = [0], structure.losses, structure.saved

    def slope(a: int, b: int) -> float:
        return (losses[b] - losses[a]) / (saved(b) - saved(a))

    for choice in range(1, len(structure.counts)):
        while len(corners) > 1 and slope(corners[-1], choice) <= slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(choice)
    return [(slope(a, b), b) for a, b in pairwise(corners)]


def _last_step(structures: Sequence[Structure], chosen: Sequence[int], excess: float) -> tuple[int, int]:
    """The structure that gives what is missing at the least loss, and its choice then."""
    found = []
    for number, (structure, present) in enumerate(zip(structures, chosen, strict=True)):
        for choice in range(present + 1, len(structure.counts)):
            if structure.saved(choice) - structure.saved(present) >= excess:
                found.append((structure.losses[choice] - structure.losses[present], number, choice))
                break
    return min(found)[1:]


def predicted(structures: Sequence[Structure], chosen: Sequence[int]) -> float:
    """The sum of the losses."""
    return sum(structure.losses[choice] for structure, choice in zip(structures, chosen, strict=True))


# --- the losses of one block ----------------------------------------------------------------------------------------


def rise_at(curve: Curve, remaining: int) -> float:
    """A curve of costs `[(remaining, rise)]`, descending, at `remaining`: linear between its points."""
    for (more, lower), (less, higher) in pairwise(curve):
        if less <= remaining <= more:
            return lower + (higher - lower) * (more - remaining) / (more - less)
    raise ValueError(f"remaining must lie in [{curve[-1][0]}, {curve[0][0]}], got {remaining}")


def priced_curve(curve: Curve, prices: Mapping[int, float]) -> list[tuple[int, float]]:
    """The loss of the logits along a block's curve: the price where it was taken, in between in the objective's shape.

    Beyond the last price it goes on with what a unit of the objective cost before it. A price below one of a smaller
    cut is noise: it counts as that one.

    Args:
        prices: {remaining: price} at points of the curve, without its first.
    """
    known, highest = [(curve[0][0], 0.0)], 0.0
    for count in sorted(prices, reverse=True):
        highest = max(highest, prices[count])
        known.append((count, highest))
    found = []
    for count, rise in curve:
        following = next((place for place, (at, _) in enumerate(known[1:], 1) if at <= count), len(known) - 1)
        (more, lower), (less, higher) = known[following - 1], known[following]
        low, high = rise_at(curve, more), rise_at(curve, less)
        share = (rise - low) / (high - low) if high > low else float(count < more)
        found.append((count, lower + (higher - lower) * share))
    return found


def losses_along(
    curves: Sequence[Curve], prices: Sequence[Mapping[int, float]], exponent: float
) -> list[list[tuple[int, float]]]:
    """The predicted losses `KL^(1-e) (c rise)^e` of several blocks along their curves.

    Args:
        curves: of each block `[(remaining, rise of its objective)]`, from all on.
        prices: of each block {remaining: price}.
        exponent: e.
    """
    priced = [priced_curve(curve, own) for curve, own in zip(curves, prices, strict=True)]
    rises = sum(curve[-1][1] for curve in curves)
    scale = sum(curve[-1][1] for curve in priced) / rises if rises > 0 else 0.0
    return [
        [
            (count, loss ** (1 - exponent) * (scale * rise) ** exponent)
            for (count, loss), (_, rise) in zip(losses, curve, strict=True)
        ]
        for losses, curve in zip(priced, curves, strict=True)
    ]
