"""What a run that stores few bits takes beside the others: the stages of `slicegpt.slicing.quantizing`."""

from __future__ import annotations

from slicegpt.slicing.planned import PlannedStage

F64 = 8

# Of a weight that is rounded, in float64: as it comes and joined with its neighbours, or brought onto the basis and cut
# to what stays; its columns in their order; and their errors.
COPIES = 4


def add_rounded_readers(stage: PlannedStage, rows: int, columns: int, item: int, device: str) -> None:
    """While the weights [rows, columns] that read the stream are rounded, all of a block at once.

    Args:
        item: bytes of a number of the model's dtype; what is rounded comes in float32 at least.
    """
    elements = rows * columns
    stage.add("block of the sliced model", max(0, 4 - item) * elements, device)
    stage.add("rounding", COPIES * F64 * elements + 2 * elements, device)
    # The moments of what they read, damped, and their factor.
    stage.add("rounding", 3 * F64 * columns * columns, device)


def add_codes(stage: PlannedStage, rows: int, columns: int, item: int, device: str) -> None:
    """Once they are rounded: what is stored of them, and what the tokens pass, until the block is stored."""
    stage.add("block of the sliced model", max(0, 4 - item) * rows * columns, device)
    stage.add("codes", rows * columns, device)


def add_rounded_writers(stage: PlannedStage, rows: int, inputs: int, remaining: int, device: str) -> None:
    """While the weights [rows, inputs] that write the stream are rounded, of which `remaining` columns stay; the
    system they minimise and its factor beside the moments that it is made of."""
    stage.add("rounding", F64 * rows * (inputs + (COPIES - 1) * remaining) + 2 * rows * remaining, device)
    stage.add("system or its inverse", 2 * F64 * remaining * remaining, device)
