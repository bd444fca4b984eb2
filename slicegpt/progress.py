"""Progress of the stages of a long run: a bar with an ETA on a terminal, a line now and then elsewhere and in the log.

Every line also goes to the logger `slicegpt.progress` at level INFO, from where `--log-file` takes it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from slicegpt.table import fit_text, output_width

logger = logging.getLogger("slicegpt.progress")

# A line after so many seconds, or so much of a stage, but not more often than `LEAST` seconds.
SECONDS, SHARE, LEAST = 30.0, 0.1, 5.0
# Seconds between two looks at the memory for a bar.
BAR_SECONDS = 1.0

_STATUS = Path("/proc/self/status")


@dataclass
class Progress:
    """Report progress on `stream` (standard error, so that results can be piped); `quiet` reports nothing.

    Attributes:
        clock: seconds that only grow.
    """

    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.perf_counter

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int, unit: str = "steps", tokens: int | None = None, done: int = 0
    ) -> Iterator[Stage]:
        """Yield the stage, to be called with the number of units done since the last call.

        The line at the end of a stage is left out where the stage is not reached: an error speaks for itself.

        Args:
            name: what is done, in a few words.
            total: units of the whole stage.
            tokens: of text in all of them, where their rate means something.
            done: units that an earlier run has done.
        """
        live = not self.quiet and self.stream.isatty()
        with tqdm(
            total=total, desc=name, unit=unit, disable=not live, file=self.stream, leave=True, initial=done
        ) as bar:
            stage = Stage(self, name, total, unit, tokens, done, bar if live else None)
            yield stage
            stage.close()
        if not self.quiet:
            self.say(stage.result(), on_screen=not live)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A stage of one step, such as loading a file."""
        with self.stage(name, 1, "step") as advance:
            yield
            advance(1)

    def say(self, line: str, on_screen: bool = True) -> None:
        """Print a line, and log it; a quiet one does neither."""
        if self.quiet:
            return
        logger.info(line)
        if on_screen:
            with tqdm.external_write_mode(file=self.stream):
                # Between words: a terminal would break them.
                print(fit_text(line, output_width(self.stream)), file=self.stream, flush=True)

    def warn(self, message: str) -> None:
        """Say what the user should know before results are trusted; a quiet one hands it to Python's `warnings`."""
        if self.quiet:
            warnings.warn(message, stacklevel=3)
        else:
            self.say(f"warning: {message}")


class Stage:
    """One stage under way; `Progress.stage` makes it.

    Attributes:
        done: units so far, those of an earlier run included.
    """

    def __init__(
        self,
        progress: Progress,
        name: str,
        total: int,
        unit: str,
        tokens: int | None,
        done: int,
        bar: tqdm | None,
    ):
        self.progress, self.name, self.total, self.unit, self.tokens = progress, name, total, unit, tokens
        self.done = self.before = done
        self.remark = ""
        self._bar = bar
        self._start = self._said = self._looked = progress.clock()
        self._said_done = done

    def __call__(self, count: int) -> None:
        """So many units are done."""
        self.done += count
        if self.progress.quiet:
            return
        now = self.progress.clock()
        if self._bar is not None:
            if now - self._looked >= BAR_SECONDS:
                self._looked = now
                self._bar.set_postfix_str(", ".join([*self._rate(now), *memory_in_use()]), refresh=False)
            self._bar.update(count)
        waited, further = now - self._said, self.done - self._said_done
        due = waited >= SECONDS or (waited >= LEAST and further >= SHARE * self.total)
        if due and self.done < self.total:
            self._said, self._said_done = now, self.done
            self.progress.say(self.line(now), on_screen=self._bar is None)

    def note(self, remark: str) -> None:
        """What stands beside the figures from now on, such as the number of layers done."""
        self.remark = remark

    def line(self, now: float) -> str:
        """How far the stage is."""
        share = 100 * self.done / self.total
        parts = [f"{share:.0f} % of {self.total:,} {self.unit}", *self._rate(now)]
        since = self.done - self.before
        if since:
            parts.append(f"ETA {duration((now - self._start) * (self.total - self.done) / since)}")
        return f"{self.name}: {', '.join([*parts, *memory_in_use()])}"

    def result(self) -> str:
        """The line at its end: what was done in this run, which may be less than was planned."""
        now = self.progress.clock()
        self.remark = ""
        parts = [
            f"{self.done - self.before} {self.unit} in {now - self._start:.1f} s",
            *self._rate(now),
            *memory_in_use(),
        ]
        return f"{self.name}: {', '.join(parts)}"

    def close(self) -> None:
        """The bar's last figures."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*self._rate(self.progress.clock()), *memory_in_use()]))

    def _rate(self, now: float) -> list[str]:
        """The remark, and the tokens a second through the whole of the stage, as far as there are any."""
        parts = [self.remark] if self.remark else []
        seconds = now - self._start
        if self.tokens and self.total and seconds > 0:
            passed = self.tokens * (self.done - self.before) / self.total
            parts.append(f"{passed / seconds:,.0f} tokens/s")
        return parts


def memory_in_use() -> list[str]:
    """Memory of this process now and at its peak, and that of the GPUs that PyTorch uses."""
    parts = []
    now, peak = resident_bytes()
    if now:
        parts.append(f"memory {_gigabytes(now)} (peak {_gigabytes(peak)})")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        count = torch.cuda.device_count()
        for index in range(count):
            now, peak = torch.cuda.memory_allocated(index), torch.cuda.max_memory_allocated(index)
            if peak or count == 1:
                name = "GPU" if count == 1 else f"GPU {index}"
                parts.append(f"{name} {_gigabytes(now)} (peak {_gigabytes(peak)})")
    return parts


def resident_bytes() -> tuple[int, int]:
    """Bytes resident in this process, now and at most so far; 0 where the system does not tell (Linux does)."""
    found = {"VmRSS": 0, "VmHWM": 0}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


def duration(seconds: float) -> str:
    """A time in words: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
