"""Search for the batch size of highest throughput: doubling until memory or throughput limits it, then refinement."""

from collections.abc import Callable
from dataclasses import dataclass, field


class BatchTooLarge(Exception):
    """A batch does not fit into memory; the message is the reason, such as "out of memory at batch 64"."""


@dataclass
class BatchSearch:
    """The result of a search, filled as it goes.

    Attributes:
        rates: tokens/s by batch, in the order of measurement.
        stop: "drop", "plateau", "memory", or "limit" (of the batch).
        reason: the same in words, with figures.
    """

    rates: dict[int, float] = field(default_factory=dict)
    stop: str | None = None
    reason: str | None = None

    @property
    def best(self) -> int:
        """The batch with the most tokens/s."""
        return max(self.rates, key=self.rates.get)


def search_batches(
    measure: Callable[[int], float],
    tolerance: float = 0.02,
    most: int = 1 << 20,
    found: BatchSearch | None = None,
) -> BatchSearch:
    """Double the batch, from 1, until memory is exhausted or throughput drops (the published protocol), then refine.

    Two consecutive doublings that improve the best throughput by less than `tolerance` end the search as well: on such
    a plateau only the time of a step grows. A drop counts only if both batches, measured again, still show it and the
    next doubling drops too or does not fit: one batch size that a machine is slow at does not end the search.

    Args:
        measure: batch -> tokens/s; raises `BatchTooLarge` where the batch does not fit.
        tolerance: relative changes below it count as noise.
        most: largest batch to try.
        found: filled as the search goes, for a caller that keeps partial results when interrupted.

    Returns:
        `found`; without rates where not even batch 1 fits.
    """
    found = found if found is not None else BatchSearch()
    batch, flat, ceiling, drop = 1, 0, most + 1, ""
    while True:
        if batch > most:
            found.stop, found.reason = "limit", f"batch limit of {most}"
            break
        try:
            rate, before = measure(batch), max(found.rates.values(), default=0.0)
            if rate < before * (1 - tolerance):
                before = min(before, measure(found.best))
                rate = max(rate, measure(batch))
        except BatchTooLarge as reason:
            found.stop, found.reason, ceiling = "memory", str(reason), batch
            break
        found.rates[batch] = rate
        if rate >= before * (1 - tolerance):
            drop = ""
        elif drop:
            found.stop, found.reason = "drop", drop
            break
        else:
            drop = f"throughput dropped from {before:.4g} to {rate:.4g} tokens/s at batch {batch}"
        flat = flat + 1 if rate < before * (1 + tolerance) else 0
        if flat == 2:
            found.stop = "plateau"
            found.reason = f"two doublings up to batch {batch} gained less than {tolerance:.0%}"
            break
        batch *= 2
    if drop:
        found.stop, found.reason = "drop", drop
    if found.rates:
        refine(measure, found, ceiling)
    return found


def refine(measure: Callable[[int], float], found: BatchSearch, ceiling: int) -> None:
    """Measure quarters between half and twice the best batch, below `ceiling`, which did not fit."""
    best = found.best
    for batch in finer(best):
        if batch >= ceiling or batch in found.rates:
            continue
        try:
            found.rates[batch] = measure(batch)
        except BatchTooLarge as reason:
            found.stop, found.reason = "memory", str(reason)
            return  # larger ones do not fit either


def finer(best: int) -> list[int]:
    """Batches around a power of two, ascending: 3/4, 5/4, 3/2 and 7/4 of it, where these are whole numbers."""
    quarters = [best * quarter // 4 for quarter in (3, 5, 6, 7) if best * quarter % 4 == 0]
    return [batch for batch in quarters if batch > 0]
