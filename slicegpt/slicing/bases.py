"""How a run of slicing chooses the basis of every boundary, and where it needs the calibration tokens for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.ranks import Ranks
from slicegpt.modeling import SlicedConfig
from slicegpt.slicing.blocks import Block
from slicegpt.slicing.covariance import Covariance
from slicegpt.slicing.eigensolver import leading_eigenvectors
from slicegpt.slicing.options import SlicingOptions, SlicingReport
from slicegpt.slicing.propagation import Propagation, check_finite
from slicegpt.slicing.rotation import align, random_orthogonal
from slicegpt.slicing.timing import StageTimer


class Bases:
    """The part of `slicegpt.slicing.slicer.Slicer` that chooses bases."""

    blocks: list[Block]
    config: SlicedConfig
    generator: torch.Generator
    options: SlicingOptions
    propagation: Propagation
    ranks: Ranks
    refits: bool
    report: SlicingReport
    shared: torch.Tensor | None
    shares: bool
    stage: StageTimer
    agreed: Callable[[Callable[[], Any]], Any]

    def is_fixed(self, boundary: int) -> bool:
        """The basis is the identity: a tied head reads the stream as the original did; or nothing is sliced."""
        config = self.config
        full = config.boundary_widths[boundary] == config.dense_hidden_size
        tied_end = config.tie_word_embeddings and boundary == config.num_blocks
        return full and (tied_end or all(kind == "identity" for kind in config.shortcuts))

    def keeps_basis(self, boundary: int) -> bool:
        """Nothing is left of the block before it but an identity shortcut: the stream keeps its basis."""
        block = self.blocks[boundary - 1] if boundary else None
        return block is not None and not block.parts and self.config.shortcuts[block.index] == "identity"

    def needs_covariance(self, boundary: int) -> bool:
        """Only a sliced boundary has a subspace to choose; in "pca" orientation every free one has a basis to."""
        if self.shares or self.keeps_basis(boundary):
            return False
        sliced = self.config.boundary_widths[boundary] < self.config.dense_hidden_size
        return sliced or (self.options.orientation == "pca" and not self.is_fixed(boundary))

    def needs_pass(self, block: Block) -> bool:
        """The calibration tokens pass a block that is refitted, or that a boundary which needs a covariance follows."""
        following = range(block.index + 1, self.config.num_blocks + 1)
        return self.refits or any(self.needs_covariance(boundary) for boundary in following)

    def choose_basis(
        self,
        boundary: int,
        covariance: Covariance | None,
        block: Block | None,
        previous: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The basis [D, d] of the boundary after `block`, and the factor of a compact shortcut that leads there."""
        if self.keeps_basis(boundary) or (self.shares and previous is not None):
            self.report.eigenvalues.append(None)
            return previous, None
        dense_width, width = self.config.dense_hidden_size, self.config.boundary_widths[boundary]
        device, orientation = self.options.device, self.options.orientation
        eigenvalues, vectors = None, torch.eye(dense_width, dtype=torch.float64, device=device)
        matrix = self.shared if covariance is None else covariance.matrix
        if covariance is not None:
            check_finite(covariance, block)
        if matrix is not None:
            with self.stage("eigensolver"):
                eigenvalues, vectors = leading_eigenvectors(matrix, dense_width)
        self.report.eigenvalues.append(None if eigenvalues is None else eigenvalues.tolist())

        basis, complement = vectors[:, :width], vectors[:, width:]
        if self.is_fixed(boundary):
            return basis, None
        if orientation == "random":
            return basis @ random_orthogonal(width, self.generator).to(device), None
        if orientation == "aligned" and previous is not None and previous.shape[1] <= width:
            with self.stage("rotation"):
                return align(previous, basis, complement)
        return basis, None

    def agree_on_basis(self, *arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`choose_basis` on rank 0; the others get the basis, and no factor, which is for the one that stores it."""
        basis, factor = self.choose_basis(*arguments) if self.ranks.first else (None, None)
        return self.agreed(lambda: basis), factor

    def new_covariance(self, boundary: int) -> Covariance | None:
        if not self.needs_covariance(boundary):
            return None
        if not self.propagation.count:
            raise SliceGPTError(f"boundary {boundary} needs calibration tokens, got none", "batches")
        return self.propagation.new_covariance()
