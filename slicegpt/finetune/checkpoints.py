"""The working folder of a run: its settings and the checkpoints that it can be resumed from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from slicegpt.checkpoint.loading import read_safetensors_header
from slicegpt.errors import SliceGPTError
from slicegpt.table import write_json

_SETTINGS = "settings.json"


def working_folder(output: Path) -> Path:
    """Where the checkpoints of a run lie that will write `output`."""
    return output.with_name(f"{output.name}.checkpoints")


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that is whole, None where there is none."""
    return max(filter(_is_whole, _checkpoints(folder)), key=_step, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes `trainer_state.json` last, so a killed process leaves none, or half of one."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
        read_safetensors_header(checkpoint / "adapter_model.safetensors")
    except (OSError, ValueError):  # SliceGPTError is a ValueError
        return False
    return (checkpoint / "optimizer.pt").is_file()


def check_settings(folder: Path, settings: dict) -> None:
    """An error where the run in `folder` was begun with other settings, which a checkpoint cannot go on under."""
    try:
        begun = json.loads((folder / _SETTINGS).read_bytes())
    except (OSError, ValueError) as error:
        raise SliceGPTError(
            f"{folder / _SETTINGS} cannot be read; overwrite it to begin anew", "resume"
        ) from error
    for name, value in json.loads(json.dumps(settings)).items():
        if begun.get(name) != value:
            raise SliceGPTError(
                f"the run in {folder} was begun with {name} = {begun.get(name)!r}, now it is {value!r}",
                "resume",
            )


def start_anew(folder: Path, settings: dict) -> None:
    """Make the folder, emptied of an earlier run's checkpoints, with the settings of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    write_json(folder / _SETTINGS, settings)


def drop_broken(folder: Path) -> None:
    """Remove checkpoints that a killed process left unfinished."""
    for checkpoint in _checkpoints(folder):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)
