"""Which heads of attention to delete: key/value groups, each a key/value head with the query heads that it serves, and
single query heads of the groups that stay.

What a group writes goes through the columns of the output projection that its query heads have, side by side. Deleting
the group deletes these together, at the rise of the refit's objective that `slicegpt.slicing.deletion` gives for a
structure; the cheapest goes first, one at a time, with exact updates in between (ZipLM, Kurtic et al. 2023; SlimGPT,
Ling et al. 2024, does it head by head). The group's rows of the query, key and value projections go with it, and its
place in the cache. Query heads go after the groups, in the same way, until every group is as small as the others:
kernels take groups of one size.
"""

from collections.abc import Iterator, Sequence

import torch

from slicegpt.slicing.deletion import Deletion


def group_deletions(deletion: Deletion, groups: Sequence[slice], count: int) -> Iterator[torch.Tensor]:
    """Delete one group after the other, each time the cheapest, until `count` stay.

    Args:
        groups: rows of `W` that each group writes through; all of them stay so far.

    Yields:
        After every group by how much it raised the objective, float64 [].
    """
    staying = list(groups)
    rows = torch.arange(len(deletion.stays), device=deletion.stays.device)
    while len(staying) > count:
        costs = torch.stack([deletion.rise(group) for group in staying])
        yield deletion.delete(rows[staying.pop(int(costs.argmin()))])


def head_deletions(
    deletion: Deletion, groups: Sequence[slice], head_dim: int, count: int
) -> Iterator[torch.Tensor]:
    """Delete one query head after the other, each time the cheapest, until each of the groups that stay has `count`.

    Args:
        groups: as above; those whose rows are deleted have none.
        head_dim: rows of a head.

    Yields:
        After every head by how much it raised the objective, float64 [].
    """
    heads = [
        [slice(start, start + head_dim) for start in range(group.start, group.stop, head_dim)]
        for group in groups
        if deletion.stays[group.start]
    ]
    rows = torch.arange(len(deletion.stays), device=deletion.stays.device)
    while any(len(group) > count for group in heads):
        choices = [(group, head) for group in heads if len(group) > count for head in group]
        costs = torch.stack([deletion.rise(head) for _, head in choices])
        group, head = choices[int(costs.argmin())]
        group.remove(head)
        yield deletion.delete(rows[head])


def groups_that_stay(deletion: Deletion, groups: Sequence[slice]) -> torch.Tensor:
    """int64, ascending: indices into `groups` of those of which some rows stay."""
    return torch.tensor([index for index, group in enumerate(groups) if deletion.stays[group].any()])
