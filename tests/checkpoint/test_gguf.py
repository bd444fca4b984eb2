"""GGUF files: the model of the file, or a line that names what it would lose."""

import numpy as np
import pytest
import torch
from support.gguf_files import architecture_settings, parameters, write_gguf
from support.tiny_models import LONG_ROPE, relative_error, tiny_model, token_ids

from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.checkpoint.gguf_config import ARCHITECTURES
from slicegpt.checkpoint.loading import load_dense
from slicegpt.errors import SliceGPTError

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

THETA = {"rope_theta": 500.0}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
PHI3 = {"sliding_window": None, "vocab_size": 512, "eos_token_id": 2, "pad_token_id": 0}
# Case of tests/support/tiny_models.py, and changes to its config.
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama-tied", {}),
    "llama biased": ("llama-biased", {}),
    "llama head size": ("llama", {"head_dim": 16}),
    "llama linear": ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA_3_1, "max_position_embeddings": 131072}),
    "llama 3.1 of its own": (
        "llama",
        {"rope_parameters": LLAMA_3_1 | {"rope_theta": 100.0, "original_max_position_embeddings": 32}},
    ),
    "llama yarn": (
        "llama",
        {
            "rope_parameters": THETA
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        },
    ),
    "mistral window": ("mistral-window", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3 head size": ("qwen3-tied", {}),
    "phi3": ("phi3-window", {"sliding_window": None}),
    "phi3 window": ("phi3-window", {}),
    "phi3 partial": ("phi3-window", {"partial_rotary_factor": 0.5}),
    "phi3 long": ("phi3-long", {}),
    "stablelm": (
        "stablelm",
        {"rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "stablelm no biases": ("stablelm", {"use_qkv_bias": False, "partial_rotary_factor": 1.0}),
    "stablelm parallel": ("stablelm-parallel", {}),
    "starcoder2": ("starcoder2", {"rope_parameters": THETA | {"rope_type": "default"}}),
    "nemotron": (
        "nemotron",
        {"rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 7,
            "layer_types": None,
            "rope_parameters": {
                "full_attention": THETA | {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "nemotron biased": ("nemotron", {"attention_bias": True, "mlp_bias": False}),
    "starcoder2 no biases": ("starcoder2", {"use_bias": False, "sliding_window": None}),
}


def small(case: str, **changes):
    return tiny_model(case, torch.float32, vocab_size=512, **changes)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_model_of_the_file(name, tmp_path, tiny_tokenizer):
    """With float32 weights in both, the logits differ by rounding at most: `rope_freqs` are float32 in the file."""
    case, changes = MODELS[name]
    model = small(case, **changes)
    loaded, tokenizer = load_dense(str(write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer)))
    ids = token_ids()
    assert relative_error(loaded(ids).logits, model(ids).logits) < 1e-6
    assert (
        tokenizer("some text", add_special_tokens=False).input_ids
        == tiny_tokenizer("some text", add_special_tokens=False).input_ids
    )
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    if name == "llama 3.1":
        assert loaded.config.rope_parameters == LLAMA_3_1
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_every_architecture_is_tried():
    kinds = {small(case, **changes).config.model_type for case, changes in MODELS.values()}
    assert kinds == {architecture.model_type for architecture in ARCHITECTURES.values()} | {"mistral"}


# Case, settings and tensors that are added, and what the line names.
SIX = np.ones(6)
REFUSED = {
    "another architecture": (
        "llama",
        {"general.architecture": "gemma2"},
        {},
        "general.architecture must be one of llama",
    ),
    "an adapter": ("llama", {"general.type": "adapter"}, {}, "general.type must be 'model', got 'adapter'"),
    "a part": ("llama", {"split.count": 3}, {}, "split.count must be 1, got 3"),
    "experts": ("llama", {"expert_count": 8}, {}, "llama.expert_count = 8: mixtures of experts are not read"),
    "soft cap": ("llama", {"attn_logit_softcapping": 50.0}, {}, "llama.attn_logit_softcapping"),
    "scaled logits": ("llama", {"logit_scale": 0.5}, {}, "llama.logit_scale"),
    "scaled scores": ("qwen2", {"attention.scale": 0.5}, {}, "qwen2.attention.scale"),
    "clamped": ("llama", {"attention.clamp_kqv": 8.0}, {}, "llama.attention.clamp_kqv"),
    "both ways": ("llama", {"attention.causal": False}, {}, "llama.attention.causal"),
    "unheard of": ("llama", {"some.thing": 1}, {}, "llama.some.thing = 1 is not supported"),
    "a window": ("qwen2", {"attention.sliding_window": 5}, {}, "qwen2.attention.sliding_window"),
    "value size": ("llama", {"attention.value_length": 6}, {}, "llama.attention.value_length"),
    "key size": ("stablelm", {"attention.key_length": 6, "attention.value_length": 6}, {}, "key_length"),
    "partial": ("llama", {"rope.dimension_count": 6}, {}, "llama.rope.dimension_count"),
    "longrope": ("llama", {"rope.scaling.type": "longrope"}, {}, "llama.rope.scaling.type"),
    "yarn without length": (
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        {},
        "llama.rope.scaling.type",
    ),
    "yarn of another kind": (
        "llama",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 2.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        {},
        "llama.rope.scaling.yarn_log_multiplier",
    ),
    "magnitude": ("llama", {"rope.scaling.attn_factor": 1.2}, {}, "llama.rope.scaling.attn_factor"),
    "both scalings": (
        "llama",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {"rope_freqs.weight": SIX},
        "llama.rope.scaling.type",
    ),
    "long factors": ("llama", {}, {"rope_factors_long.weight": SIX}, "rope_factors_long.weight"),
    "half of the factors": ("phi3-long", {}, {"rope_factors_short.weight": None}, "rope_factors_long.weight"),
    "per layer": (
        "llama",
        {"attention.head_count_kv": [2, 1, 2]},
        {},
        "llama.attention.head_count_kv must be one int",
    ),
    "missing setting": ("llama", {"block_count": None}, {}, "llama.block_count is missing"),
    "no table": ("llama", {}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    "missing weight": ("llama", {}, {"blk.1.ffn_up.weight": None}, "model.layers.1.mlp.up_proj.weight"),
    "a bias": ("llama", {}, {"blk.0.attn_q.bias": np.ones(48)}, "blk.0.attn_q.bias"),
    "a layer more": ("llama", {"block_count": 2}, {}, "blk.2.attn_k.weight"),
    "another width": (
        "llama",
        {"feed_forward_length": 96},
        {},
        r"must be \[96, 48\] by its config, got \[80, 48\]",
    ),
    "no heads": ("llama", {"attention.head_count": 0}, {}, "llama.attention.head_count"),
    "heads that cannot be shared": ("llama", {"attention.head_count_kv": 3}, {}, "num_key_value_heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_named(name, tmp_path, tiny_tokenizer):
    case, metadata, tensors, message = REFUSED[name]
    model = small(case, **({"use_sliding_window": False} if case == "qwen2" else {}))
    file = write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer, metadata, tensors)
    with pytest.raises(SliceGPTError, match=message) as error:
        load_dense(str(file))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SliceGPTError) as same:
        open_dense(str(file))
    assert str(same.value) == str(error.value)


@torch.no_grad()
def test_settings_that_say_nothing_new(tmp_path, tiny_tokenizer):
    model = small("llama")
    said = {
        "expert_count": 0,
        "attention.key_length": 12,
        "attention.value_length": 12,
        "attention.sliding_window": 0,
        "rope.scaling.type": "none",
        "rope.scaling.finetuned": False,
        "general.name": "a name",
        "tensor_data_layout": "Meta AI original pth",
        "split.count": 1,
    }
    loaded, _ = load_dense(str(write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer, said)))
    assert relative_error(loaded(token_ids()).logits, model(token_ids()).logits) < 1e-6


def test_the_writer_of_these_tests_writes_every_parameter():
    model = small("phi3-long", rope_parameters=LONG_ROPE)
    assert len(parameters(model, "phi3")) == len(list(model.parameters()))
    assert architecture_settings(model)["rope.scaling.original_context_length"] == 32
