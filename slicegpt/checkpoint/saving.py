"""Saving a sliced model as a Hugging Face folder, whole or not at all, and reading what is in one."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from slicegpt.checkpoint.loading import read_safetensors_header
from slicegpt.checkpoint.model_card import model_card
from slicegpt.checkpoint.self_contained import write_modeling_code
from slicegpt.errors import SliceGPTError
from slicegpt.table import write_json

RECORD = "slicing.json"


def check_output(output: str | Path, overwrite: bool) -> Path:
    """The output folder's path; an error where it exists (without `overwrite`) or cannot be made."""
    path = Path(output).absolute()
    if path.exists() and not overwrite:
        raise SliceGPTError(f"--output: {output} exists already; choose another folder or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise SliceGPTError(f"--output: {output} is a file, expected a folder")
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SliceGPTError(f"--output: cannot make the folder {parent}: {error.strerror}") from error
    if not os.access(parent, os.W_OK):
        raise SliceGPTError(f"--output: no permission to write in {parent}")
    return path


def check_space(path: Path, needed: int) -> None:
    """An error before the work begins where the disk cannot hold the result."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SliceGPTError(
            f"--output: no space left: the sliced model takes {needed / 1e6:.1f} MB and {path.parent} "
            f"has {free / 1e6:.1f} MB free"
        )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when all went well, and vanishes when not.

    A killed process leaves at most a folder whose name starts with a dot; `path` is the old one or the new one.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        _open_to_readers(temporary)
        if path.exists():
            replaced = temporary.with_suffix(".replaced")
            path.rename(replaced)
            temporary.rename(path)
            shutil.rmtree(replaced)
        else:
            temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SliceGPTError(f"--output: no space left while writing {path}; nothing was kept") from error
        raise
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if "No space left" in str(error):  # safetensors and tokenizers raise their own types
            raise SliceGPTError(f"--output: no space left while writing {path}; nothing was kept") from error
        raise


def _open_to_readers(folder: Path) -> None:
    """Permissions as any new file has them: temporary folders and safetensors files begin private to their owner."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The commands report their own stages; transformers would draw a bar for every shard besides."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_sliced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    record: dict,
    output: str | Path,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    self_contained: bool = False,
) -> Path:
    """Write config, safetensors, tokenizer, generation config, `slicing.json` and a model card under `output`.

    Args:
        record: what `slicing.json` says; the card is made from it.
        overwrite: an existing folder is replaced once the new one is whole.
        self_contained: write the modelling code as well, so that the folder loads without slicegpt; a model that
            came from such a folder keeps to it.

    Returns:
        The folder's absolute path.

    Errors:
        `SliceGPTError` for an existing folder, a path that cannot be written, and a full disk.
    """
    path = check_output(output, overwrite)
    self_contained = self_contained or getattr(model.config, "auto_map", None) is not None
    with atomic_folder(path) as folder, _no_progress_bars():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if self_contained:
            write_modeling_code(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, record)
        (folder / "README.md").write_text(model_card(record, path.name, self_contained), encoding="utf-8")
    return path


@dataclass(frozen=True)
class StoredSize:
    """What the weight files of a folder hold."""

    parameters: int
    bytes: int


def stored_size(folder: str | Path) -> StoredSize:
    """Elements and bytes of all tensors in a folder's safetensors files, from their headers alone."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SliceGPTError(f"model: {folder} holds no safetensors files")
    entries = [entry for file in files for entry in read_safetensors_header(file).values()]
    return StoredSize(
        parameters=sum(math.prod(entry["shape"]) for entry in entries),
        bytes=sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries),
    )


def read_record(folder: str | Path) -> dict | None:
    """`slicing.json` of a folder, or None where there is none."""
    file = Path(folder) / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
