"""The report of a slicing run: `slicing.json` as a value that prints as a table."""

from dataclasses import dataclass
from typing import Any

from slicegpt.checkpoint.model_card import summarise
from slicegpt.modeling.sizes import describe_neurons, format_bytes
from slicegpt.table import format_table


@dataclass(frozen=True)
class SliceReport:
    """What a slicing run did; `print(report)` shows dense and sliced sizes side by side.

    Attributes:
        record: what `slicing.json` holds: `size` (parameters and bytes, dense and sliced), `boundaries` (width, rank
            and kind of shortcut), `calibration` (source, tokens, sha256, coverage, warnings), `refit`, `seconds`,
            `eigenvalues` and more.
    """

    record: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """The record without the eigenvalues, which are thousands of numbers."""
        return {key: value for key, value in self.record.items() if key != "eigenvalues"}

    @property
    def warnings(self) -> list[str]:
        """Why the calibration text may not be enough, one sentence each."""
        return self.record["calibration"].get("warnings", [])

    def __str__(self) -> str:
        record = self.record
        size, boundaries = record["size"], record["boundaries"]
        rows = [
            {
                "": "dense",
                "parameters": size["dense_parameters"],
                "bytes": format_bytes(size["dense_bytes"]),
                "removed": "0.0 %",
                "widths": str(record["dense_width"]),
                "neurons": record["dense_neurons"],
                "shortcuts": "none",
            },
            {
                "": "sliced",
                "parameters": size["parameters"],
                "bytes": format_bytes(size["bytes"]),
                "removed": f"{100 * size['removed']:.1f} %",
                "widths": summarise([boundary["width"] for boundary in boundaries]),
                "neurons": describe_neurons(record["neurons"]),
                "shortcuts": summarise([boundary["shortcut"] for boundary in boundaries[:-1]]),
            },
        ]
        seconds = sum(record["seconds"].values())
        tokens = record["calibration"]["tokens"]
        return (
            f"{format_table(rows, list(rows[0]))}\n"
            f"slicing (1 - d/D): {100 * record['slicing']:.1f} %, {tokens:,} tokens, {seconds:.1f} s"
        )
