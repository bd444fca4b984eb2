"""The state of a run in `OUTPUT.partial`, so that one that was killed goes on after its last block.

    run.json                      how the run was called, what it reads, and the samples' sources
    calibration.safetensors       the samples that were drawn, those that the model wrote among them
    state-000042.safetensors      a snapshot: streams, basis, random state, figures so far; two of them
    fit-*.safetensors             the output weights of each candidate of λ
    model/                        the weights so far, in their places

Everything is on the disk before a snapshot gets its name, and the one before it stays until the next: whenever the
process dies, one of them is whole, and what was written after it is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slicegpt.calibration import Calibration, CalibrationBatch
from slicegpt.checkpoint.folders import sync_folder
from slicegpt.checkpoint.model_files import ModelFiles
from slicegpt.checkpoint.partial import CALL, STATE_FILES, PartialFolder, partial_path, read_call
from slicegpt.checkpoint.report import SliceReport
from slicegpt.checkpoint.saving import read_record
from slicegpt.checkpoint.tensor_files import TensorFiles
from slicegpt.checkpoint.tensors import open_files
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource, Weights
from slicegpt.hardware.devices import find_device
from slicegpt.progress import Progress
from slicegpt.recipe import AUTO, Recipe
from slicegpt.slicing.keeping import Keeper, Snapshot
from slicegpt.units import parse_bytes

# Seconds after which a run is worth keeping.
KEEP_AFTER = 120.0

WHEN = ("auto", "always", "never")
_CALIBRATION = "calibration.safetensors"
# Of each input file so much is hashed: the header of any safetensors file, and the most of a GGUF file's.
_HASHED = 1 << 20


class RunKeeper(Keeper):
    """Keeps the snapshots of a run in its partial folder.

    Args:
        when: "always", "never", or "auto": once the run is older than `KEEP_AFTER` seconds, or was resumed.
        began: when that was, as `time.monotonic()` tells.
    """

    def __init__(self, partial: PartialFolder, sink: ModelFiles, progress: Progress, when: str, began: float):
        super().__init__()
        self.partial, self.sink, self.progress, self.when, self.began = partial, sink, progress, when, began
        self._found: Snapshot | None = None
        self._last = Snapshot("drawn")
        self._number = 0
        self._warned = False

    def resume(self) -> None:
        """Take up the newest snapshot that is whole.

        Raises:
            SliceGPTError: none is.
        """
        files = sorted(self.partial.folder.glob(STATE_FILES), reverse=True)
        for file in files:
            number = int(re.sub(r"\D", "", file.name))
            self._number = max(self._number, number)
            try:
                state = read_state(file)
                tensors = Weights(open_files([file]))
            except (SliceGPTError, SafetensorError, OSError, ValueError, TypeError, LookupError):
                self.progress.warn(f"{file} is damaged; going on from the state before it")
                file.unlink()  # the next one takes its number's place, and is not to be taken for it
                continue
            self.journal = state["journal"]
            self._found = self._last = Snapshot(state["stage"], state["done"], state["data"], tensors)
            return
        raise SliceGPTError(
            f"no state in {self.partial.folder} can be read; --overwrite starts over", "resume"
        )

    def begin(self, call: dict, drawn: Calibration) -> None:
        """Keep what every snapshot goes with."""
        if self.when == "never":
            return
        write_call(self.partial.folder, call)
        write_calibration(self.partial.folder, drawn)
        self.keep(Snapshot("drawn"))

    def found(self, stage: str) -> Snapshot | None:
        return self._found if self._found is not None and self._found.stage == stage else None

    @property
    def is_due(self) -> bool:
        if self.when != "auto":
            return self.when == "always"
        return self._number > 0 or time.monotonic() - self.began >= KEEP_AFTER

    def keep(self, snapshot: Snapshot) -> None:
        """Write a snapshot where it is time to; a disk that has no room for it is no reason to end the run."""
        self._last = snapshot
        if not self.is_due:
            return
        try:
            self._write(snapshot)
        except OSError as error:
            (self.partial.folder / "state.writing").unlink(missing_ok=True)
            if not self._warned:
                self.progress.warn(
                    f"the run's state cannot be kept in {self.partial.folder} ({error.strerror}); it goes on without"
                )
                self._warned = True

    def note(self, **decisions: Any) -> None:
        super().note(**decisions)
        # Those of a snapshot that was found are read now: its file goes when there are newer ones.
        self.keep(replace(self._last, tensors=dict(self._last.tensors)))

    def _write(self, snapshot: Snapshot) -> None:
        folder, writing = self.partial.folder, "state.writing"
        self.sink.sync()
        sync_folder(self.partial.model)
        streams = snapshot.propagation
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in snapshot.tensors.items()}
        entries |= {} if streams is None else streams.entries()
        state = {
            "stage": snapshot.stage,
            "done": snapshot.done,
            "data": snapshot.data,
            "journal": self.journal,
        }
        (folder / writing).unlink(missing_ok=True)
        files = TensorFiles(folder, {writing: entries}, entries, {"state": json.dumps(state)})
        try:
            for name, tensor in snapshot.tensors.items():
                files.write(name, tensor)
            for name, tensor in () if streams is None else streams.tensors():
                files.write(name, tensor)
            files.sync()
        finally:
            files.close()
        self._number += 1
        (folder / writing).rename(folder / STATE_FILES.replace("*", f"{self._number:06d}"))
        sync_folder(folder)
        for old in sorted(folder.glob(STATE_FILES))[:-2]:
            old.unlink()


def read_state(file: Path) -> dict:
    """What a snapshot's file says beside its tensors: `stage`, `done`, `data` and `journal`."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["state"])


def newest_state(output: str | Path) -> dict | None:
    """`read_state` of the newest snapshot of a run into `output`; None where there is none."""
    file = max(partial_path(output).glob(STATE_FILES), default=None)
    return None if file is None else read_state(file)


# --- how the run was called ---------------------------------------------------------------------------------------


def call_of(recipe: Recipe, resolved: Recipe, machine: Mapping[str, Any], source: DenseSource) -> dict:
    """What `run.json` says of a call.

    Args:
        recipe, resolved: as it was given, and with everything filled in.
        machine: options that are no part of a recipe, and decide about what is written.
    """
    return {
        "recipe": recipe.choices(),
        "resolved": resolved.choices(),
        "machine": dict(machine),
        "inputs": fingerprints(source),
    }


def write_call(folder: Path, call: dict) -> None:
    """Keep what `call_of` says, whole or not at all."""
    with (folder / f"{CALL}.writing").open("w", encoding="utf-8") as stream:
        json.dump(call, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    (folder / f"{CALL}.writing").rename(folder / CALL)


def interrupted_call(output: str | Path | None, resume: bool, keep_state: str) -> dict | None:
    """How the run to go on with was called; None for one that begins.

    Args:
        output: None: of such a run nothing is kept.
    """
    if keep_state not in WHEN:
        raise SliceGPTError(f"must be one of {', '.join(WHEN)}, got {keep_state!r}", "keep_state")
    if resume and output is None:
        raise SliceGPTError("needs an output folder, and a model by its name: no other run is kept", "resume")
    return read_call(output) if resume else None


def finished(output: str | Path) -> tuple[Path, PreTrainedTokenizerBase, SliceReport]:
    """The folder, tokenizer and report of a run that was killed after its last step."""
    path = Path(output)
    PartialFolder(path.absolute()).discard()
    return (
        path,
        AutoTokenizer.from_pretrained(path, local_files_only=True),
        SliceReport(read_record(path), os.fspath(output)),
    )


def check_recipe(call: dict, recipe: Recipe) -> None:
    """Refuse a recipe that is not the one the run began with.

    Raises:
        SliceGPTError: the first choice that differs, with both values.
    """
    old, resolved, new = call["recipe"], call["resolved"], recipe.choices()
    # A size that takes another's place is the one to name.
    for name in sorted(old.keys() | new.keys(), key=lambda name: (name not in new, name)):
        if new.get(name) != old.get(name) and new.get(name, resolved.get(name)) != resolved.get(name):
            _refuse(name, old.get(name), new.get(name))


def machine_options(
    call: dict | None,
    *,
    device: str | torch.device | None,
    max_shard_size: str | None,
    self_contained: bool | None,
) -> dict[str, Any]:
    """The options that are no part of a recipe and decide about what is written, filled in; of the device its type.

    Args:
        call: of the run to go on with, whose options take the place of those that are None (a device of "auto").

    Raises:
        SliceGPTError: as `check_recipe`.
    """
    given = {
        "device": None if device in (None, AUTO) else find_device(device).type,
        "max_shard_size": max_shard_size,
        "self_contained": self_contained,
    }
    if call is None:
        defaults = {"device": find_device(None).type, "max_shard_size": "5GB", "self_contained": True}
    else:
        defaults = call["machine"]
        for name, value in given.items():
            same = value in (None, defaults[name])
            if name == "max_shard_size" and not same:  # in whatever units
                same = parse_bytes(str(value)) == parse_bytes(str(defaults[name]))
            if not same:
                _refuse(name, defaults[name], value)
    return {name: defaults[name] if value is None else value for name, value in given.items()}


def _refuse(name: str, old: Any, new: Any) -> None:
    raise SliceGPTError(f"the run began with {old!r}, got {new!r}; --overwrite starts over", name)


def fingerprints(source: DenseSource) -> dict[str, list]:
    """Of every file that the model is read from: size, time of its last change, and a hash of its beginning."""
    files = {tensor.file for tensor in source.tensors.stored.values() if hasattr(tensor, "file")}
    if not files and Path(source.name).is_dir():  # PyTorch's own files are read whole
        files = set(Path(source.name).glob("*.bin"))
    found = {}
    for file in sorted(map(Path, files)):
        status = file.stat()
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_HASHED)).hexdigest()
        found[os.fspath(file.absolute())] = [status.st_size, status.st_mtime_ns, digest]
    return found


def check_inputs(call: dict, source: DenseSource) -> None:
    """Refuse a model whose files are not those that the run began with.

    Raises:
        SliceGPTError: the first file that is new, gone or different.
    """
    old, new = call["inputs"], fingerprints(source)
    for file in sorted(old.keys() | new.keys()):
        if old.get(file) != new.get(file):
            kind = "is new" if file not in old else "is gone" if file not in new else "has changed"
            raise SliceGPTError(f"{file} {kind} since the run began; --overwrite starts over", "model")


# --- calibration samples ------------------------------------------------------------------------------------------


def write_calibration(folder: Path, drawn: Calibration) -> None:
    """Keep the samples, whole or not at all."""
    tensors = {"held_out": drawn.held_out, "unseen": drawn.unseen, "seen": drawn.seen}
    for index, batch in enumerate(drawn.batches):
        tensors |= {f"input_ids.{index}": batch.input_ids, f"attention_mask.{index}": batch.attention_mask}
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"batches": str(len(drawn.batches)), "sources": json.dumps(drawn.sources)}
    files = TensorFiles(folder, {f"{_CALIBRATION}.writing": entries}, entries, metadata)
    try:
        for name, tensor in tensors.items():
            files.write(name, tensor)
        files.sync()
    finally:
        files.close()
    (folder / f"{_CALIBRATION}.writing").rename(folder / _CALIBRATION)
    sync_folder(folder)


def read_calibration(folder: Path) -> Calibration:
    """The samples that `write_calibration` kept.

    Raises:
        SliceGPTError: the file is not whole.
    """
    file = folder / _CALIBRATION
    try:
        tensors = Weights(open_files([file]))
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
    except (OSError, SafetensorError) as error:
        raise SliceGPTError(f"{file} cannot be read; --overwrite starts over", "resume") from error
    batches = [
        CalibrationBatch(tensors[f"input_ids.{index}"], tensors[f"attention_mask.{index}"])
        for index in range(int(metadata["batches"]))
    ]
    windows = (tensors[name] for name in ("held_out", "unseen", "seen"))
    return Calibration(batches, json.loads(metadata["sources"]), *windows)
