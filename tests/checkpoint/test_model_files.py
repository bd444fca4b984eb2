"""Weights written to the disk as slicing goes: byte for byte the folder that `save_pretrained` writes."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.sliced_models import batches
from support.tiny_models import tiny_model, token_ids

from slicegpt.checkpoint.model_files import ModelFiles
from slicegpt.checkpoint.tensor_files import TensorFiles
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.slicing import SlicingOptions, slice_checkpoint, slice_model

HELD_OUT = token_ids(3, 16, seed=99)
# Case, dtype, width, shape, options.
RUNS = {
    "search and allocation": ("llama", torch.float32, 36, Shape(neurons=0.3, round_to=4), {}),
    "tied, search": ("llama-tied", torch.bfloat16, 36, Shape(round_to=4), {}),
    "tied head behind a projection": ("qwen3-tied", torch.float64, 36, Shape(slice_head=True), {"refit": False}),
    "one ridge, dense shortcuts": ("opt", torch.float32, 36, Shape("dense"), {"ridge": 0.3}),
    "search, dense shortcuts, biases": ("phi", torch.float32, 36, Shape("dense", neurons=0.3, round_to=4), {}),
    "untied, learned positions": ("opt-untied", torch.float16, 40, Shape(), {"refit": False}),
    "an activation with weights": ("apertus", torch.bfloat16, 36, Shape(neurons=0.3, round_to=4), {}),
    "heads and a layer without": ("qwen3-tied", torch.float32, 36, Shape(round_to=4, kv_groups=(0, 1, 2)), {}),
    "nothing is sliced": ("gpt-neox", torch.float32, 48, Shape(), {}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize("name", RUNS)
def test_the_folder_that_save_pretrained_writes(name, shards, tmp_path):
    case, dtype, width, shape, options = RUNS[name]
    model = tiny_model(case, dtype)
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, width, shape.slice_head), shape)
    common = {"batches": batches(4), "options": SlicingOptions(dtype, neuron_multiple=4, **options)}
    sliced, expected = slice_model(model, config, **common, held_out=HELD_OUT)
    sliced.save_pretrained(tmp_path / "saved", max_shard_size=shards)

    for folder in ("written", "fits"):
        (tmp_path / folder).mkdir()
    sink = ModelFiles(tmp_path / "written", tmp_path / "fits", shards)
    stored, report = slice_checkpoint(checkpoint_of(model), config, sink, **common, held_out=HELD_OUT)
    assert all(
        torch.equal(tensor, sliced.state_dict()[name]) for name, tensor in sink.finished(None).tensors.items()
    )
    sink.close()
    written, saved = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("written", "saved")
    )
    assert written.keys() == saved.keys()
    assert (len(written) > 4) == (shards == "30KB")
    assert all(written[file] == saved[file] for file in saved)
    assert stored.neurons == sliced.config.neurons
    assert (report.refit, report.ridge_search) == (expected.refit, expected.ridge_search)


TENSORS = {
    "z": torch.arange(15.0).view(3, 5),
    "a.b": torch.arange(7).bfloat16(),
    "long": torch.arange(4),
    "double": torch.ones(2, 2, dtype=torch.float64),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(3, dtype=torch.float16),
    "empty": torch.zeros(0, 3),
    "é": torch.zeros(()),
}
ENTRIES = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def files_in(folder) -> TensorFiles:
    return TensorFiles(folder, {"x.safetensors": TENSORS}, ENTRIES, {"format": "pt"})


def test_tensors_in_any_order_and_in_pieces(tmp_path):
    files = files_in(tmp_path)
    assert os.path.getsize(tmp_path / "x.safetensors") > 0  # with room for all of them
    for name in reversed(TENSORS):
        files.write(name, iter(TENSORS[name].split(2)) if name == "z" else TENSORS[name])
    assert all(torch.equal(files[name], TENSORS[name]) for name in files)
    files.sync()
    files.close()
    save_file(TENSORS, tmp_path / "expected.safetensors", {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_what_was_written_is_kept_and_other_shapes_begin_anew(tmp_path):
    files = files_in(tmp_path)
    files.write("z", TENSORS["z"])
    files.close()
    again = files_in(tmp_path)
    assert torch.equal(again["z"], TENSORS["z"])
    again.close()
    entries = ENTRIES | {"z": (torch.float32, (5, 3))}
    other = TensorFiles(tmp_path, {"x.safetensors": TENSORS}, entries, {"format": "pt"})
    assert not other["z"].any()
    other.close()
    assert load_file(tmp_path / "x.safetensors").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TENSORS["z"].double(), "z: torch.float32"),
        (TENSORS["z"].mT, "z: torch.float32"),
        (TENSORS["z"][:2], "fewer rows"),
        ([TENSORS["z"], TENSORS["z"][:1]], "more rows"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, value, message):
    files = files_in(tmp_path)
    with pytest.raises(ValueError, match=message):
        files.write("z", value)
    files.close()
