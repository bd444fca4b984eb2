"""The report of a slicing run: `slicing.json` as a value that prints as a table."""

import shlex
from dataclasses import dataclass
from typing import Any

from slicegpt.checkpoint.outcome import asked_and_got, notes, outcome_rows, shape_rows
from slicegpt.table import fit_text, format_table


@dataclass(frozen=True)
class SliceReport:
    """What a slicing run did; `print(report)` shows the dense and the sliced model side by side.

    Attributes:
        record: what `slicing.json` holds: `size` (parameters and bytes, dense and sliced), `asked` (the size that was
            asked for), `perplexity` (on held-out windows, dense and sliced), `tokens_per_second` (of the runtime),
            `boundaries` (width, rank and kind of shortcut), `calibration` (source, tokens, sha256, coverage,
            warnings), `refit`, `seconds`, `eigenvalues` and more.
        output: the folder that was written; None: none was.
    """

    record: dict[str, Any]
    output: str | None = None

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
        rows = outcome_rows(record) + shape_rows(record)
        asked = asked_and_got(record)
        columns = f"{100 * record['slicing']:.1f} % of the columns deleted"
        lines = [format_table(rows, list(rows[0])), columns if asked is None else f"{asked}; {columns}"]
        lines += notes(record)
        seconds = sum(record["seconds"].values())
        lines.append(f"sliced on {record['calibration']['tokens']:,} tokens in {seconds:.1f} s")
        lines[1:] = map(fit_text, lines[1:])
        if self.output is not None:  # a command is copied: no terminal's width breaks it
            folder = shlex.quote(self.output)
            lines += [
                f"saved: {self.output}",
                f'next: slicegpt generate {folder} --prompt "Once upon a time"',
            ]
        return "\n".join(lines)
