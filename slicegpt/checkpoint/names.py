"""The names that a model may go by, checked without loading anything."""

from __future__ import annotations

import re
from pathlib import Path

from slicegpt.errors import SliceGPTError

SHIPPED_MODEL = "smollm2-135m"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_name(name: str, argument: str = "name") -> None:
    """Refuse what cannot be a model: `load_dense` does so, and the commands do before they import torch.

    Args:
        name: what `load_dense` takes.
        argument: what the caller calls it.

    Raises:
        SliceGPTError: an empty name, a file that is no GGUF file, a folder without config.json, or a name that is
            neither there nor a hub id.
    """
    path, reason = Path(name), None
    if not name:
        reason = "must name a model, got an empty one"
    elif name.lower() == SHIPPED_MODEL:
        return
    elif path.is_file() and path.suffix.lower() != ".gguf":
        reason = (
            f"{name} is no model: expected a folder, a .gguf file or a hub id (give the folder that holds it)"
        )
    elif path.is_dir() and not (path / "config.json").is_file():
        reason = f"{name} has no config.json: it is not a Hugging Face model folder"
    elif not path.exists() and (
        not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors", ".bin"))
    ):
        reason = f"{name} does not exist (and cannot be a hub id)"
    if reason is not None:
        raise SliceGPTError(reason, argument)
