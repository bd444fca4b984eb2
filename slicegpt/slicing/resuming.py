"""What a run of slicing keeps between two blocks, and how another process goes on from there."""

from __future__ import annotations

import torch

from slicegpt.slicing.keeping import Keeper, Snapshot
from slicegpt.slicing.options import SlicingReport
from slicegpt.slicing.propagation import Propagation


class Resumed:
    """The part of `slicegpt.slicing.slicer.Slicer` that keeps its state."""

    keeper: Keeper
    propagation: Propagation
    report: SlicingReport
    generator: torch.Generator

    def keep(self, done: int, basis: torch.Tensor) -> None:
        """Between two blocks: what the next ones need, so that another process can go on from here."""
        with self.propagation.gathered() as first:
            if first:
                self.keeper.keep(self.snapshot(done, basis))

    def snapshot(self, done: int, basis: torch.Tensor) -> Snapshot:
        """What `keep` keeps."""
        spectra = {
            f"eigenvalues.{boundary}": torch.tensor(values, dtype=torch.float64)
            for boundary, values in enumerate(self.report.eigenvalues)
            if values is not None
        }
        tensors = spectra | {"basis": basis, "generator": self.generator.get_state()}
        data = {
            "remaining": [[index, list(shares.items())] for index, shares in self.remaining],
            "seconds": self.report.seconds,
        }
        ends = done == self.config.num_blocks
        return Snapshot("slicing", done, data, tensors, None if ends else self.propagation)

    def restore(self, found: Snapshot | None, done: int) -> torch.Tensor:
        """Go on where another process has stopped, after `done` blocks; returns the basis there.

        Args:
            found: None on all ranks but the first, which has the snapshot.
        """
        if found is not None:
            self.restore_figures(found)
        if done < self.config.num_blocks:
            self.propagation.restore(found and found.tensors)
        return self.agreed(lambda: found.tensors["basis"].to(self.options.device))

    def restore_figures(self, found: Snapshot) -> None:
        """What the first rank alone knows."""
        self.remaining = [(index, dict(shares)) for index, shares in found.data["remaining"]]
        self.report.seconds.update(found.data["seconds"])
        for boundary in range(found.done + 1):
            name = f"eigenvalues.{boundary}"
            known = found.tensors[name].tolist() if name in found.tensors else None
            self.report.eigenvalues.append(known)
        self.generator.set_state(found.tensors["generator"])
