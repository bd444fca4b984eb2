"""Files that would load as another model than the one in them, and configs that describe none."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_folders import edit_config, edit_weights, error_of, tiny_llama, without
from support.tiny_models import relative_error

from slicegpt.checkpoint.loading import load_dense
from slicegpt.runtime import to_canonical

SURPLUS = {
    "a bias": {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
    "a layer": {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)},
    "a scale": {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
}


@pytest.mark.parametrize("name", SURPLUS)
def test_weights_that_the_config_has_no_place_for(name, folder):
    edit_weights(folder, lambda weights: weights.update(SURPLUS[name]))
    message = error_of(folder)
    assert message.endswith(f"LlamaForCausalLM has no place for by its config: {next(iter(SURPLUS[name]))}")


def test_buffers_that_older_releases_saved(folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(folder, lambda weights: weights.update(buffer))
    load_dense(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_without_a_word_in_the_config(dtype, folder, nothing_is_loaded):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(48, 32).to(dtype)}))
    assert f"{name} is stored as " in error_of(folder)


@pytest.mark.parametrize("peft", [True, False])
def test_an_adapter_beside_the_weights(peft, folder, nothing_is_loaded, monkeypatch):
    """Whether transformers would apply it, as it does with peft, or pass over it."""
    if not peft:
        without(monkeypatch, "peft")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json): merge it into its model first" in error_of(folder)


@torch.no_grad()
def test_a_tied_flag_beside_a_head_of_its_own(tiny_tokenizer, tmp_path):
    """transformers keeps both tables, and so does all that is made of the model; equal tables are one."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 100, 200, 7]])
    for head, tied in ((torch.randn(512, 32), False), (None, True)):
        table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
        own = (table if head is None else head).clone()
        edit_weights(tmp_path, lambda weights, own=own: weights.update({"lm_head.weight": own}))
        model, _ = load_dense(str(tmp_path), torch.float64)
        canonical = to_canonical(model)
        assert canonical.config.tie_word_embeddings == tied
        expected = model.model(ids).last_hidden_state @ own.double().T
        assert relative_error(model(ids).logits, expected) < 1e-12
        # transformers' norms are in float32, the canonical ones are not.
        assert relative_error(canonical(ids).logits, expected) < 1e-6


BAD_CONFIGS = {
    "activation": ({"hidden_act": "swiglu"}, "llama: hidden_act must be one of .*, got 'swiglu'"),
    "learned activation": ({"hidden_act": "xielu"}, "llama: hidden_act must be one of "),
    "rope": (
        {"rope_parameters": {"rope_type": "ntk_by_parts", "rope_theta": 1e4, "factor": 2.0}},
        "llama: rope_parameters: rope_type must be one of default, linear, .*, got 'ntk_by_parts'",
    ),
    "factors": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}},
        "cannot read .*config.json: .*long_factor",
    ),
    "type": ({"hidden_size": "wide"}, "cannot read .*config.json: "),
    "heads": (
        {"num_key_value_heads": 3},
        "llama: num_key_value_heads must be a divisor of num_attention_heads",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_what_is_wrong_with_a_config_is_named(name, folder, nothing_is_loaded):
    changes, message = BAD_CONFIGS[name]
    edit_config(folder, **changes)
    assert re.search(message, error_of(folder, sliceable=True))


def test_a_file_does_not_choose_its_outputs(folder):
    edit_config(folder, return_dict=False, output_hidden_states=True)
    model, _ = load_dense(str(folder))
    assert model(torch.tensor([[1, 2]])).hidden_states is None


@pytest.mark.parametrize("shard", [7, "../model.safetensors", None, ["a"]])
def test_an_index_that_leads_elsewhere(shard, sharded, nothing_is_loaded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "weight_map must name files of the same folder" in error_of(sharded)
