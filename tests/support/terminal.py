"""A command in a terminal of a given size, as a person runs it: what it writes, line by line, and how it ends."""

import errno
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from dataclasses import dataclass
from pathlib import Path

# Colours and cursor movements; what they write over is not on the screen any more.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")


@dataclass(frozen=True)
class Session:
    """What a command left on the screen, standard output and error together, and its exit code."""

    output: str
    code: int

    @property
    def lines(self) -> list[str]:
        """Lines as they stand in the end: of what returns to the line's start, the last."""
        text = _ESCAPES.sub("", self.output).replace("\r\n", "\n")
        return [line.rstrip("\r").split("\r")[-1] for line in text.split("\n")]

    @property
    def widest(self) -> int:
        """Columns of the longest line that was written, also of those that were written over."""
        text = _ESCAPES.sub("", self.output).replace("\r", "\n")
        return max(map(len, text.split("\n")))

    @property
    def next_commands(self) -> list[str]:
        """The commands that it proposes: `next: slicegpt ...`."""
        return [line.removeprefix("next: ") for line in self.lines if line.startswith("next: ")]


def run_in_terminal(
    command: list[str],
    folder: Path,
    columns: int = 80,
    rows: int = 24,
    answers: str = "",
    seconds: float = 300,
) -> Session:
    """Run a command in `folder` with a terminal on its standard streams.

    Args:
        answers: typed at once; a terminal echoes it, so that it stands in the output as well.
        seconds: after which it is killed, which is an error.
    """
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm"
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        close_fds=True,
    )
    os.close(theirs)
    written, deadline = b"", time.monotonic() + seconds
    if answers:
        os.write(mine, answers.encode())
    try:
        while True:
            if time.monotonic() > deadline:
                process.kill()
                raise TimeoutError(
                    f"{command} took more than {seconds} s:\n{written.decode(errors='replace')}"
                )
            if not select.select([mine], [], [], 1)[0]:
                continue
            try:
                part = os.read(mine, 1 << 16)
            except OSError as error:  # Linux says so where the last one has closed the other end
                if error.errno != errno.EIO:
                    raise
                part = b""
            if not part:
                break
            written += part
        code = process.wait(timeout=60)
    finally:
        os.close(mine)
        process.kill()
        process.wait()
    return Session(written.decode(errors="replace"), code)
