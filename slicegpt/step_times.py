"""How long a decoding step takes, by what it reads: what a speed-up is planned by.

Nothing heavy is imported here, see `slicegpt.recipe`.
"""

from __future__ import annotations

import math
import re
from dataclasses import astuple, dataclass, fields

_PAIR = re.compile(r"([a-z]+)\s+(\S+)")


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one decoding step, a sum over what it passes; measured by `slicegpt.runtime.step_times`.

    Attributes:
        step: of what is not in the layers: embedding, head, the choice of a token.
        layer: of each layer, however little it reads: launches, norms, the cache.
        mlp, attention, shortcut: of each element of these weights.
    """

    step: float
    layer: float
    mlp: float
    attention: float
    shortcut: float

    def __post_init__(self):
        if not all(math.isfinite(value) and value >= 0 for value in astuple(self)) or not self.mlp > 0:
            raise ValueError("times must be finite and at least 0, those of the MLP above it")

    def seconds(self, layers: int, mlp: int, attention: int, shortcut: int) -> float:
        """Of a network with so many layers and elements."""
        weights = mlp * self.mlp + attention * self.attention + shortcut * self.shortcut
        return self.step + layers * self.layer + weights

    def __str__(self) -> str:
        """As a recipe holds it, to four digits: "step 1.9e-03 layer 1.2e-04 mlp 4.1e-11 ..."."""
        return " ".join(f"{own.name} {getattr(self, own.name):.3e}" for own in fields(self))

    @classmethod
    def parse(cls, text: str) -> StepTimes:
        """Of `str`.

        Raises:
            ValueError: another text.
        """
        found = {name: float(value) for name, value in _PAIR.findall(text)}
        names = [own.name for own in fields(cls)]
        if sorted(found) != sorted(names) or _PAIR.sub("", text).strip():
            raise ValueError(f"must name {', '.join(names)}, each with its seconds")
        return cls(**found)
