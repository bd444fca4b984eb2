"""Losses of a model that is read layer by layer: those of the loaded model, from one layer in memory at a time."""

import pytest
import torch
from support.checkpoint_folders import save_deep
from support.gguf_files import write_gguf
from support.memory import run_and_measure
from support.sliced_models import FORMS, network
from support.tiny_models import CASES, tiny_model, token_ids

from slicegpt.checkpoint.dense_source import open_dense, source_of
from slicegpt.checkpoint.loading import load_dense
from slicegpt.errors import SliceGPTError
from slicegpt.hardware import layerwise
from slicegpt.hardware.layerwise import layerwise_losses, losses_of
from slicegpt.modeling.losses import window_losses

WINDOWS = token_ids(5, 12)


def saved_model(model, folder, tokenizer) -> str:
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return str(folder)


def check(name: str) -> None:
    """The same bits as the loaded model's losses: the same modules compute them from the same numbers."""
    source, (model, _) = open_dense(name), load_dense(name)
    for size in (1, 2):
        expected = window_losses(model, WINDOWS, size)
        assert layerwise_losses(source, WINDOWS, size) == expected
        assert losses_of(source_of(model), WINDOWS, size) == expected
        assert layerwise_losses(source_of(model), WINDOWS, size) == expected
    assert window_losses(model, WINDOWS, 2) == expected  # the model is as it was


@pytest.mark.parametrize("case", CASES)
def test_every_family(case, tiny_tokenizer, tmp_path):
    check(saved_model(tiny_model(case, torch.bfloat16, vocab_size=512), tmp_path, tiny_tokenizer))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("case", ["llama-tied", "opt", "phi"])
def test_sliced_models(case, form, tiny_tokenizer, tmp_path):
    model = network(case, form, torch.float32, vocab_size=512)
    check(saved_model(model, tmp_path, tiny_tokenizer))


def test_gguf(tiny_tokenizer, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = tiny_model("llama", torch.float32, vocab_size=512)
    check(str(write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer)))


def test_groups_of_windows(tiny_tokenizer, tmp_path, monkeypatch):
    """The last group is smaller than the others, and its last batch as well."""
    source = open_dense(saved_model(tiny_model("phi3-window", vocab_size=512), tmp_path, tiny_tokenizer))
    expected = layerwise_losses(source, WINDOWS, 1)
    assert layerwise_losses(source, WINDOWS, 1, windows_at_once=2) == expected
    # Two windows of 12 tokens, 48 columns and 8 bytes are half of what is free.
    monkeypatch.setattr(layerwise, "free_memory", lambda device: 4 * 12 * 48 * 8)
    calls = []
    losses = layerwise.LayerwiseModel.losses
    monkeypatch.setattr(
        layerwise.LayerwiseModel,
        "losses",
        lambda self, batches, advance: calls.append(len(batches)) or losses(self, batches, advance),
    )
    assert layerwise_losses(source, WINDOWS, 1) == expected
    assert calls == [2, 2, 1]


@pytest.mark.parametrize("case", ["llama", "opt", "phi", "granite-tied", "cohere"])
def test_a_head_in_pieces(case, tiny_tokenizer, tmp_path, monkeypatch):
    """Scaled logits, a bias of the head, a tied table; pieces of 83 of 512 rows, of which the last is smaller.

    A logit is a sum of 48 products, whatever the piece it is in: in float64 two orders of summing differ by at most
    48 · 2⁻⁵³ · |h| |w| (Higham 2002, section 3.1), twice as the loss counts, for it is 2-Lipschitz in the largest
    logit; no |h| |w| here exceeds 100. The sum over the vocabulary adds 512 roundings of a number below log(512) + 100.
    Over 11 tokens of a window.
    """
    model = tiny_model(case, vocab_size=512)
    source = open_dense(saved_model(model, tmp_path, tiny_tokenizer))
    expected = torch.tensor(window_losses(load_dense(str(tmp_path))[0], WINDOWS), dtype=torch.float64)
    monkeypatch.setattr(layerwise, "TABLE_BYTES", 83 * 48 * 8)
    losses = torch.tensor(layerwise_losses(source, WINDOWS), dtype=torch.float64)
    bound = 11 * (2 * 48 * 100 + 512 * 107) * 2**-53
    assert (losses - expected).abs().max() <= bound


def test_every_weight_is_read_once(tiny_tokenizer, tmp_path, monkeypatch):
    source = open_dense(saved_model(tiny_model("llama", vocab_size=512), tmp_path, tiny_tokenizer))
    read, elements = type(next(iter(source.tensors.stored.values()))).read, []

    def counted(self, *rows):
        tensor = read(self, *rows)
        elements.append(tensor.numel())
        return tensor

    monkeypatch.setattr(type(next(iter(source.tensors.stored.values()))), "read", counted)
    layerwise_losses(source, WINDOWS)
    assert sum(elements) == source.parameters


def test_a_loss_that_is_not_finite(tiny_tokenizer, tmp_path):
    model = tiny_model("llama", torch.float32, vocab_size=512)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    source = open_dense(saved_model(model, tmp_path, tiny_tokenizer))
    with pytest.raises(SliceGPTError, match="model: the loss of window 0 is nan"):
        layerwise_losses(source, WINDOWS)


def test_a_model_without_a_list_of_layers():
    model = tiny_model("llama", num_hidden_layers=2)
    model.config.num_hidden_layers = 3
    with pytest.raises(SliceGPTError, match="LlamaForCausalLM cannot be run layer by layer"):
        layerwise_losses(source_of(model), WINDOWS)


MEASURE = """
import sys, torch
from slicegpt.bench.harness.memory import peak_bytes
from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.hardware.layerwise import layerwise_losses

source = open_dense(sys.argv[1])
windows = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
before = peak_bytes(torch.device("cpu"))
layerwise_losses(source, windows)
print(before, peak_bytes(torch.device("cpu")), source.total_bytes)
"""


def test_memory_is_one_layer(tiny_tokenizer, tmp_path):
    """24 layers of 29 MB, 706 MB in all, are more than is allowed, which is three layers and 64 MB: one layer, another
    that the allocator has not given back, and what PyTorch's operators and buffers take when they are first used."""
    layer = save_deep(tmp_path, tiny_tokenizer, 24)
    before, after, total = run_and_measure(MEASURE, str(tmp_path))
    allowed = 3 * layer + (64 << 20)
    assert total > 4 * allowed
    assert after - before <= allowed
