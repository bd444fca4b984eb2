"""Second moments of a mixture of experts: one regression for each expert, see `slicegpt.slicing.mixture_refit`."""

from __future__ import annotations

import os

import torch

from slicegpt.hardware.ranks import Ranks
from slicegpt.slicing.filed_moments import moments_for
from slicegpt.slicing.mixtures import LiftedMixture, RoutedActivations, routed_to
from slicegpt.slicing.moments import JoinedBatches, Moments

# Rows that an expert waits for, see `slicegpt.slicing.moments.TOKENS_PER_CALL`: all experts wait at once.
ROWS_PER_CALL = 1024


class MixtureMoments:
    """The `Moments` of every expert, and of the shared one.

    Attributes:
        parts: by the names of the block's writers.
        tokens: int64 [experts], how many were routed to each expert, without their weights.
    """

    def __init__(self, parts: dict[str, Moments], device: torch.device):
        self.parts, self.device = parts, device
        self.tokens = torch.zeros(len(parts), dtype=torch.int64, device=device)

    @property
    def spilled(self) -> bool:
        return any(part.spilled for part in self.parts.values())

    def reduce_(self, ranks: Ranks) -> None:
        """As `Moments.reduce_`."""
        for part in self.parts.values():
            part.reduce_(ranks)
        ranks.reduce_(self.tokens)

    def is_finite(self) -> bool:
        return all(part.is_finite() for part in self.parts.values())

    def share_scale(self) -> None:
        """Once all tokens are added: what the penalty is in proportion to becomes one number for all experts."""
        routed = [self.parts[name] for name in routed_to([*self.parts])]
        scale = torch.stack([part.diagonal().mean() for part in routed]).mean()
        for part in routed:
            part.scale = scale

    def starved(self) -> list[int]:
        """The experts that fewer tokens were routed to than they have neurons: their own weights decide."""
        names = routed_to([*self.parts])
        counts = self.tokens[: len(names)].tolist()
        return [
            number
            for number, (name, count) in enumerate(zip(names, counts, strict=True))
            if count < self.parts[name].size
        ]

    def joined(self, lifted: LiftedMixture) -> JoinedMixture:
        """What batches are added by."""
        return JoinedMixture(self, lifted)


def mixture_moments(
    lifted: LiftedMixture, width: int, beside: int, scratch: str | os.PathLike | None
) -> MixtureMoments:
    """Moments of every expert without tokens; in files where they do not fit into a CPU's memory all together.

    Args:
        beside: bytes that are taken while tokens are added.
    """
    device = lifted.weight.device
    whole = sum(8 * size * (size + width) for size in lifted.sizes.values())
    parts = {
        name: moments_for([size], width, device, beside + whole - 8 * size * (size + width), scratch)
        for name, size in lifted.sizes.items()
    }
    return MixtureMoments(parts, device)


class JoinedMixture:
    """Adds batches to the moments of every expert; `finish` adds the rest. `lifted` writes as before the fit."""

    def __init__(self, moments: MixtureMoments, lifted: LiftedMixture):
        self.moments, self.lifted = moments, lifted
        self.joined = {name: JoinedBatches(part, ROWS_PER_CALL) for name, part in moments.parts.items()}
        self.numbers = {name: number for number, name in enumerate(moments.parts)}

    def add_batch(
        self,
        activations: RoutedActivations,
        target: torch.Tensor,
        weights: torch.Tensor,
        present: torch.Tensor | None,
    ) -> None:
        """Tokens that are no padding: what the experts write from, and what they have to write together [..., D].

        Args:
            weights: [batch, tokens], of the tokens' squared errors; present: a mask like them, or None.
        """
        error = (target - self.lifted.written(activations)).flatten(0, -2)
        weights = weights.flatten()
        # P, the sum of all weights of a token.
        total = activations.routing.weights[activations.routing.places].sum(dim=1).to(weights.dtype)
        if activations.shared is not None:
            own = activations.shared_weight
            total = total + (1.0 if own is None else own.to(total.dtype))
        share = (error / total[:, None]).to(error.dtype)
        present = None if present is None else present.flatten()
        for name, tokens, own, factor, output in self.lifted.members(activations):
            target_rows, row_weights = output + share[tokens], weights[tokens] * total[tokens]
            if factor is not None:
                row_weights = row_weights * factor.to(row_weights.dtype)
            rows = own
            if present is not None:
                keep = present[tokens]
                rows, target_rows, row_weights = rows[keep], target_rows[keep], row_weights[keep]
            self.moments.tokens[self.numbers[name]] += len(rows)
            if len(rows):
                self.joined[name].add(rows.to(target_rows.dtype), target_rows, row_weights)

    def finish(self) -> MixtureMoments:
        for joined in self.joined.values():
            joined.finish()
        return self.moments
