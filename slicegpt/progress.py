"""Progress of the stages of a long run: a bar with an ETA on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from tqdm import tqdm

from slicegpt.table import fit_text, output_width


@dataclass
class Progress:
    """Report progress on `stream` (standard error, so that results can be piped); `quiet` reports nothing."""

    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str = "steps") -> Iterator[Callable[[int], object]]:
        """Yield `advance(n)`, to be called with the number of units done since the last call.

        The line at the end of a stage is left out where the stage is not reached: an error speaks for itself.
        """
        start = time.perf_counter()
        live = not self.quiet and self.stream.isatty()
        with tqdm(total=total, desc=name, unit=unit, disable=not live, file=self.stream, leave=True) as bar:
            yield bar.update
        if not self.quiet and not live:
            seconds = time.perf_counter() - start
            print(f"{name}: {total} {unit} in {seconds:.1f} s", file=self.stream, flush=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A stage of one step, such as loading a file."""
        with self.stage(name, 1, "step") as advance:
            yield
            advance(1)

    def say(self, line: str) -> None:
        """Print a line; a quiet one does not."""
        if not self.quiet:
            print(line, file=self.stream, flush=True)

    def warn(self, message: str) -> None:
        """Say what the user should know before results are trusted; a quiet one hands it to Python's `warnings`."""
        if self.quiet:
            warnings.warn(message, stacklevel=3)
        else:
            # Between words: a terminal would break them.
            text = fit_text(f"warning: {message}", output_width(self.stream))
            print(text, file=self.stream, flush=True)
