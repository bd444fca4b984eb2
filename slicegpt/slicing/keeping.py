"""What an interrupted run needs to go on; `slicegpt.checkpoint.kept_run` writes it to the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from slicegpt.slicing.propagation import Propagation


@dataclass(frozen=True)
class Snapshot:
    """A run between two blocks.

    Attributes:
        stage: "drawn", "allocation" or "slicing".
        done: blocks of the stage that are done.
        data: plain values.
        tensors: those that the stage needs by name; of a snapshot that was found, read at access.
        propagation: whose streams belong to it; None where they are not needed any more.
    """

    stage: str
    done: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    propagation: Propagation | None = None


class Keeper:
    """Keeps nothing: the run has to start over.

    Attributes:
        journal: what has been decided so far, plain values; it is kept beside every snapshot.
    """

    def __init__(self):
        self.journal: dict[str, Any] = {}

    def found(self, stage: str) -> Snapshot | None:
        """What an earlier process has kept, where it stopped in this stage."""
        return None

    def keep(self, snapshot: Snapshot) -> None:
        """Called after every block; the newest snapshot takes the place of the others."""

    def note(self, **decisions: Any) -> None:
        """Enter decisions into the journal, and keep the last snapshot again."""
        self.journal |= decisions
