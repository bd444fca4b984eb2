"""Whether a head is tied, and whether a projection stands before it, are two facts of a config."""

import json

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import relative_error, tiny_model, token_ids
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from slicegpt import SlicedConfig
from slicegpt.runtime import Runtime

# With its last boundary sliced a tied head is read through a projection; else it follows the kept final norm.
SLICED_HEADS = [False, True]


def tied_model(slice_head: bool, case: str = "llama-tied"):
    return sliced(tiny_model(case, torch.float32), 36, dtype=torch.float32, slice_head=slice_head)[0]


@torch.no_grad()
@pytest.mark.parametrize("slice_head", SLICED_HEADS)
@pytest.mark.parametrize("case", ["llama-tied", "opt"])
def test_untied_in_memory_trained_apart_saved_and_loaded(case, slice_head, tmp_path):
    model, ids = tied_model(slice_head, case), token_ids()
    tied_logits = model(ids).logits
    model.config.tie_word_embeddings = False
    # Twice the head gives twice the logits exactly, but for a shift that the head's own bias (OPT has none) would add.
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(again(ids).logits, 2 * tied_logits)


@pytest.mark.parametrize("slice_head", SLICED_HEADS)
def test_untied_while_loading_has_the_shape_of_a_tied_one(slice_head, tmp_path):
    """As for Llama: the head that the folder does not hold starts fresh, all else is the folder's."""
    model, dense = tied_model(slice_head), tiny_model("llama-tied", torch.float32)
    for untied, folder in ((model, tmp_path / "sliced"), (dense, tmp_path / "dense")):
        untied.save_pretrained(folder)
        again, report = AutoModelForCausalLM.from_pretrained(
            folder, tie_word_embeddings=False, output_loading_info=True
        )
        assert again.lm_head.weight is not again.get_input_embeddings().weight
        assert again.lm_head.weight.shape == untied.lm_head.weight.shape
        assert set(report["missing_keys"]) == {"lm_head.weight"}
        kept = zip(untied.model.parameters(), again.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in kept)
    assert isinstance(again, LlamaForCausalLM)


@torch.no_grad()
@pytest.mark.parametrize("slice_head", SLICED_HEADS)
def test_folders_without_the_field_load_as_before(slice_head, tmp_path):
    model, ids = tied_model(slice_head), token_ids()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("head_projection") is slice_head
    file.write_text(json.dumps(fields))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_runtime_reads_an_untied_head():
    """Packing goes by the modules that are there, not by the flag."""
    model, ids = tied_model(slice_head=True), token_ids()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight)
    assert relative_error(Runtime(model).logits(ids), model(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("changes", "expected", "got"),
    [({"embed_projection": True, "head_projection": False}, 32, 24), ({}, 24, 32)],
)
def test_only_equal_widths_can_be_tied(changes, expected, got):
    shape = {
        "dense_hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "boundary_widths": [24] * 3,
    }
    with pytest.raises(Exception, match=rf"head as wide as the embedding, {expected} columns, got {got}"):
        SlicedConfig(**shape, **changes, tie_word_embeddings=True)
