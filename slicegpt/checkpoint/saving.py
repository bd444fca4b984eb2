"""Saving a sliced model as a Hugging Face folder, whole or not at all, and reading what is in one."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from slicegpt.checkpoint.folders import atomic_folder, check_output
from slicegpt.checkpoint.loading import read_safetensors_header
from slicegpt.checkpoint.model_card import model_card
from slicegpt.checkpoint.self_contained import leave_out_modeling_code, write_modeling_code
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import FILE_NAME, Recipe
from slicegpt.table import write_json

RECORD = "slicing.json"


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
    self_contained: bool = True,
    recipe: Recipe | None = None,
) -> Path:
    """Write config, safetensors, tokenizer, generation config, `slicing.json` and a model card under `output`.

    Args:
        record: what `slicing.json` says; the card is made from it.
        overwrite: an existing folder is replaced once the new one is whole.
        self_contained: write the modelling code as well, so that the folder loads without slicegpt.
        recipe: the choices that made the model, written as `recipe.toml`; None: of no use to repeat it, as after
            fine-tuning.

    Returns:
        The folder's absolute path.

    Errors:
        `SliceGPTError` for an existing folder, a path that cannot be written, and a full disk.
    """
    path = check_output(output, overwrite)
    with atomic_folder(path) as folder, _no_progress_bars():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_beside_weights(folder, path.name, tokenizer, record, self_contained, recipe)
    return path


def write_beside_weights(
    folder: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    record: dict,
    self_contained: bool,
    recipe: Recipe | None,
) -> None:
    """Write what stands in a model's folder beside its weights and their config.

    Args:
        name: that the folder will have.
    """
    (write_modeling_code if self_contained else leave_out_modeling_code)(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(folder / RECORD, record)
    if recipe is not None:
        recipe.write(folder / FILE_NAME)
    card = model_card(record, name, self_contained, recipe is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class StoredSize:
    """What the weight files of a folder hold."""

    parameters: int
    bytes: int


def stored_size(folder: str | Path) -> StoredSize:
    """Elements and bytes of all tensors in a folder's safetensors files, from their headers alone."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SliceGPTError(f"{folder} holds no safetensors files", "model")
    entries = [entry for file in files for entry in read_safetensors_header(file).values()]
    return StoredSize(
        parameters=sum(math.prod(entry["shape"]) for entry in entries),
        bytes=sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries),
    )


def read_record(folder: str | Path) -> dict | None:
    """`slicing.json` of a folder, or None where there is none."""
    file = Path(folder) / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
