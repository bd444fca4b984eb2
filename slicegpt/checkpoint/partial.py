"""`OUTPUT.partial`: a model's folder while it is being written, beside the one that it becomes.

    OUTPUT.partial/lock       held by the process that writes
    OUTPUT.partial/model      the folder that gets the final name once it is whole
    OUTPUT.partial/...        what the run needs until then

It stands beside the output folder, and so on the same file system, whatever that is: the final rename is one step.
Nothing heavy is imported here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slicegpt.checkpoint.folders import no_space_errors, put_in_place
from slicegpt.errors import SliceGPTError

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs into one folder are then not told apart
    fcntl = None


def partial_path(output: str | Path) -> Path:
    """The folder that a run into `output` works in."""
    path = Path(output).absolute()
    return path.with_name(f"{path.name}.partial")


class PartialFolder:
    """The folder of a run that has it to itself.

    Attributes:
        path: of the output.
        folder: `OUTPUT.partial`.
        model: what becomes the output.
        is_whole: nothing is missing but the final name.
    """

    def __init__(self, path: Path):
        self.path, self.folder = path, partial_path(path)
        self.model = self.folder / "model"
        self.is_whole = False
        self._lock: int | None = None

    def enter(self) -> None:
        """Make the folder; one that a process which is gone has left is emptied.

        Raises:
            SliceGPTError: another process is writing there.
        """
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._unlock()
                raise SliceGPTError(f"another run is writing {self.path} at this moment", "output") from error
        replaced = self._replaced
        if replaced.exists() and not self.path.exists():
            replaced.rename(self.path)  # killed between two renames: the old output is not lost
        for left in self.folder.iterdir():
            if left.name != "lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.model.mkdir()

    @property
    def _replaced(self) -> Path:
        return self.folder / "replaced"

    def finish(self) -> None:
        """The model takes its final name, and the rest goes."""
        self.is_whole = True
        try:
            put_in_place(self.model, self.path, self._replaced)
        except OSError as error:
            raise SliceGPTError(
                f"cannot give {self.model}, which is whole, the name {self.path}: {error.strerror}", "output"
            ) from error
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None


@contextmanager
def partial_folder(path: Path) -> Iterator[PartialFolder]:
    """A folder to write a model in, which takes the name `path` when all went well, and vanishes when not."""
    partial = PartialFolder(path)
    partial.enter()
    try:
        with no_space_errors(path):
            yield partial
            partial.finish()
    except BaseException:
        if not partial.is_whole:
            partial.discard()
        raise
