"""`OUTPUT.partial`: a model's folder while it is being written, beside the one that it becomes.

    OUTPUT.partial/lock       held by the process that writes
    OUTPUT.partial/model      the folder that gets the final name once it is whole
    OUTPUT.partial/sliced     in its place while another one, made of it, takes that name
    OUTPUT.partial/state-*    what an interrupted run goes on from, see `slicegpt.checkpoint.kept_run`

It stands beside the output folder, and so on the same file system, whatever that is: the final rename is one step.
Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slicegpt.checkpoint.folders import is_full_disk, put_in_place, sync_folder
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import Recipe

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs into one folder are then not told apart
    fcntl = None

CALL, STATE_FILES = "run.json", "state-*.safetensors"


def partial_path(output: str | Path) -> Path:
    """The folder that a run into `output` works in."""
    path = Path(output).absolute()
    return path.with_name(f"{path.name}.partial")


def is_resumable(output: str | Path) -> bool:
    """Whether a run into `output` has left a state to go on from."""
    return any(partial_path(output).glob(STATE_FILES))


def is_finished(output: str | Path) -> bool:
    """Whether a run into `output` was killed when nothing was left to do but to tidy up."""
    return is_resumable(output) and Path(output).exists() and not (partial_path(output) / "model").exists()


def interrupted_recipe(output: str | Path) -> Recipe:
    """The choices that the interrupted run into `output` was given.

    Raises:
        SliceGPTError: there is none, or they cannot be read.
    """
    return Recipe().override(**read_call(output)["recipe"])


def read_call(output: str | Path) -> dict:
    """How the interrupted run into `output` was called, see `slicegpt.checkpoint.kept_run.call_of`.

    Raises:
        SliceGPTError: there is none, or its file cannot be read.
    """
    check_partial(output, resume=True, overwrite=False)
    file = partial_path(output) / CALL
    try:
        call = json.loads(file.read_text(encoding="utf-8"))
        Recipe().override(**call["recipe"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SliceGPTError(f"{file} cannot be read; --overwrite starts over", "resume") from error
    return call


def what_is_kept(output: str | Path) -> str | None:
    """One clause for the message of a run that ends early; None where nothing is kept."""
    if is_resumable(output):
        return f"what was done is kept in {partial_path(output)}, --resume goes on with it"
    return None


def check_partial(output: str | Path, resume: bool, overwrite: bool) -> None:
    """Refuse to resume where there is nothing, and to begin anew where something would be lost.

    Args:
        resume: go on with an interrupted run.
        overwrite: begin anew whatever is there.

    Raises:
        SliceGPTError: as it says.
    """
    partial, found = partial_path(output), is_resumable(output)
    if resume and not found:
        raise SliceGPTError(f"there is no interrupted run into {output} ({partial} holds no state)", "resume")
    if found and not (resume or overwrite):
        raise SliceGPTError(
            f"{partial} holds an interrupted run into {output}: --resume goes on with it, --overwrite starts over",
            "output",
        )


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

    def enter(self, resume: bool) -> None:
        """Make the folder; one that a process which is gone has left is emptied, unless the run is resumed.

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
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)  # killed between two renames: the old output is not lost
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        if not resume:
            # The states first: without them nothing of the rest counts.
            for left in sorted(self.folder.iterdir(), key=lambda file: not file.match(STATE_FILES)):
                if left.name != "lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        elif self._sliced.exists():  # killed while the model was exchanged: the state goes with this one
            if self.model.exists():
                shutil.rmtree(self.model)
            self._sliced.rename(self.model)
        self.model.mkdir(exist_ok=True)

    def exchange(self, folder: Path) -> None:
        """Another folder, below this one and whole, is what becomes the output; a state still goes with the old one."""
        self.model.rename(self._sliced)
        folder.rename(self.model)

    @property
    def _sliced(self) -> Path:
        return self.folder / "sliced"

    @property
    def _replaced(self) -> Path:
        return self.folder / "replaced"

    def finish(self) -> None:
        """The model takes its final name, and the rest goes."""
        for file in self.model.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(self.model)
        self.is_whole = True
        try:
            put_in_place(self.model, self.path, self._replaced)
        except OSError as error:
            raise SliceGPTError(
                f"cannot give {self.model}, which is whole, the name {self.path}: {error.strerror}", "output"
            ) from error
        sync_folder(self.path.parent)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def leave(self) -> None:
        """Without finishing: what a run could go on from stays, anything else goes."""
        if self.is_whole or any(self.folder.glob(STATE_FILES)):
            self._unlock()
        else:
            self.discard()

    def _unlock(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None


@contextmanager
def partial_folder(path: Path, resume: bool = False) -> Iterator[PartialFolder]:
    """A folder to write a model in, which takes the name `path` when all went well.

    When not, it vanishes, unless it holds a state to go on from. What the machine is to blame for (a full disk, a file
    that is gone) is then one line, which says what is kept.
    """
    partial = PartialFolder(path)
    partial.enter(resume)
    try:
        yield partial
        partial.finish()
    except BaseException as error:
        partial.leave()
        told = _told(error, path)
        if told is None:
            raise
        raise told from error


def _told(error: BaseException, path: Path) -> SliceGPTError | None:
    """What a run that ended by an error of the system says; None for all others."""
    kept = what_is_kept(path)
    if is_full_disk(error):
        return SliceGPTError(f"no space left while writing {path}; {kept or 'nothing was kept'}", "output")
    if isinstance(error, OSError):
        where = path if error.filename is None else error.filename
        return SliceGPTError(f"{where}: {error.strerror or error}; {kept or 'nothing was kept'}")
    if isinstance(error, SliceGPTError) and isinstance(error.__cause__, OSError) and kept:
        return SliceGPTError(f"{error.reason}; {kept}", error.argument)
    return None
