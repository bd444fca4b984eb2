"""A block at several counts of what it keeps: the curve of its objective, and what writes at each of them.

One factorisation serves all counts: what is deleted goes from one solution, and what `Deletion` leaves of it is the
solution of what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from slicegpt.errors import SliceGPTError
from slicegpt.families import Linear
from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.blocks import group_rows, neuron_rows
from slicegpt.slicing.deletion import Deletion
from slicegpt.slicing.heads import group_deletions
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.neurons import ROUNDS, neuron_deletions
from slicegpt.slicing.objective import Objective, Writer
from slicegpt.slicing.regression import prior_of


@dataclass(frozen=True)
class Level:
    """A block that keeps some of a part.

    Attributes:
        count: neurons or key/value groups that stay.
        rise: of the refit's objective, above the fit with all of them.
        writer: the fit at full width, [K, D] float64 with 0 in the rows of what is deleted, and its bias.
    """

    count: int
    rise: float
    writer: Writer


def levels(
    config: SlicedConfig,
    objective: Objective,
    moments: Moments,
    writers: Mapping[str, Linear],
    ridge: float,
    part: str,
    counts: Sequence[int],
) -> Iterator[Level]:
    """The fits of a block with so many neurons, or key/value groups, one after the other.

    Without any, the block's part is a constant, whatever the family: the fit then has a bias, the best one beside the
    rows that stay.

    Args:
        config: of the dense model, or of a sliced one of it.
        moments: of the block's tokens.
        writers: of each part of the block, in the order of the activations' columns, as the dense model has them.
        ridge: λ.
        part: "attention" or "mlp".
        counts: descending.

    Raises:
        SliceGPTError: counts that are not those of what the part has, in descending order.
    """
    everything = config.num_key_value_heads if part == "attention" else config.dense_intermediate_size
    if list(counts) != sorted(set(counts), reverse=True) or not all(0 <= n <= everything for n in counts):
        raise SliceGPTError(f"must be descending, in [0, {everything}], got {list(counts)}", "counts")
    prior = prior_of(writers.values())
    deletion = Deletion(partial(objective.normal_equations, moments, ridge, prior))
    count, rise = everything, 0.0
    for following in counts:
        if part == "attention":
            staying = [rows for rows in group_rows(config) if deletion.stays[rows.start]]
            steps = group_deletions(deletion, staying, following)
        else:
            step = max(1, -(-(everything - min(counts)) // ROUNDS))
            rounds = [min(step, gone) for gone in range(count - following, 0, -step)]
            steps = neuron_deletions(deletion, neuron_rows(writers), rounds)
        rise += sum(more.item() for more in steps)
        count = following
        weight, bias = deletion.weight.clone(), None
        if prior.bias is not None or not count:
            bias = (moments.outputs - moments.inputs @ weight) / moments.tokens
        if prior.bias is None and not count:
            # A constant beside the same weights: the best one takes so much off Σ w ‖t - a W‖².
            rise -= (bias.square().sum() * moments.tokens).item()
        yield Level(count, rise, Writer(weight, bias))
