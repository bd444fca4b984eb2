"""A run of slicing into a folder holds a layer of the model at a time, however many there are."""

import weakref

import pytest
import torch
from support.saved_models import save_dense, save_text

from slicegpt import api
from slicegpt.checkpoint.tensor_files import TensorFiles
from slicegpt.checkpoint.tensors import FileTensor
from slicegpt.runtime import speed

LAYERS = 8

pytestmark = pytest.mark.filterwarnings("ignore:the calibration text is small")


class Alive:
    """Bytes of those tensors that something still holds."""

    def __init__(self):
        self.now = self.most = 0

    def add(self, tensor: torch.Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(tensor.untyped_storage(), self.remove, size)

    def remove(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("allocate", ["objective", "prices"])
def test_one_layer_at_a_time(allocate, tiny_tokenizer, documents, tmp_path, monkeypatch):
    """Of all that is read, dense or sliced: prices, trials, slicing, choice of λ and the look at held-out windows."""
    folder = save_dense(tmp_path / "dense", tiny_tokenizer, num_hidden_layers=LAYERS)
    text = save_text(tmp_path / "train.txt", documents)
    alive, written, read, write = Alive(), [], FileTensor.read, TensorFiles.write

    def noted(self, begin=0, end=None):
        tensor = read(self, begin, end)
        alive.add(tensor)
        return tensor

    def listed(self, name, tensor):
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(speed, "CPU_PARAMETERS", 1000)  # the model is a large one
    monkeypatch.setattr(FileTensor, "read", noted)
    monkeypatch.setattr(TensorFiles, "write", listed)
    choices = {"keep": 0.85, "allocate": allocate, "round_to": 4, "nsamples": 16, "seqlen": 32}
    result = api.slice(folder, calibration=text, output=tmp_path / "out", **choices)
    record = result.report.record
    assert len(set(record["neurons"])) > 1
    assert record["ridge_search"]
    assert "too large to be loaded" in record["tokens_per_second"]["note"]
    assert record["calibration"]["held_out"]
    # The largest part is the head, with the last norm: 512 rows of 48 numbers in float32; a layer has 386 such rows.
    assert alive.most <= 4 * 48 * (512 + 1)
    # Blocks are written in their order, and not at the end.
    readers = [name for name in written if name.endswith("self_attn.q_proj.weight")]
    assert readers == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(LAYERS)]
    assert written.index("model.layers.0.mlp.up_proj.weight") < written.index(readers[1])
