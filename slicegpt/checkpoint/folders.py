"""An output folder: checked before the work begins, written whole or not at all. Nothing heavy is imported here."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slicegpt.errors import SliceGPTError


def check_output(output: str | Path, overwrite: bool, source: str | Path | None = None) -> Path:
    """The output folder's path; an error where it exists (without `overwrite`) or cannot be made.

    Args:
        source: the model that is read, which must neither be the folder nor lie in it: it would be gone.
    """
    path = Path(output).absolute()
    if source is not None and Path(source).exists():
        read, written = Path(source).resolve(), path.resolve()
        if written == read or written in read.parents:
            raise SliceGPTError(f"{output} would replace the model {source}; choose another folder", "output")
    if path.exists() and not overwrite:
        raise SliceGPTError(f"{output} exists already; choose another folder, or overwrite it", "output")
    if path.exists() and not path.is_dir():
        raise SliceGPTError(f"{output} is a file, expected a folder", "output")
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SliceGPTError(f"cannot make the folder {parent}: {error.strerror}", "output") from error
    if not os.access(parent, os.W_OK):
        raise SliceGPTError(f"no permission to write in {parent}", "output")
    return path


def check_space(path: Path, needed: int) -> None:
    """An error before the work begins where the disk cannot hold the result."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SliceGPTError(
            f"no space left: the sliced model takes {needed / 1e6:.1f} MB and {path.parent} "
            f"has {free / 1e6:.1f} MB free",
            "output",
        )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when all went well, and vanishes when not.

    A killed process leaves at most a folder whose name starts with a dot; `path` is the old one or the new one.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        put_in_place(temporary, path, temporary.with_suffix(".replaced"))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full_disk(error):
            raise SliceGPTError(f"no space left while writing {path}; nothing was kept", "output") from error
        raise


def put_in_place(folder: Path, path: Path, replaced: Path) -> None:
    """A whole folder takes its final name; one that has it goes, once the new one is there.

    Args:
        replaced: a name on the same file system, free, which the old folder has in between.
    """
    open_to_readers(folder)
    if not path.exists():
        folder.rename(path)
        return
    path.rename(replaced)
    folder.rename(path)
    shutil.rmtree(replaced)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no space left; safetensors and tokenizers raise their own types."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in str(error)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk, as far as the system can tell."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_to_readers(folder: Path) -> None:
    """Permissions as any new file has them: temporary folders and safetensors files begin private to their owner."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
