"""The runtime on mixtures of experts and attention sinks; what all families share is tests/runtime/test_runtime.py."""

import pytest
import torch
from support.sliced_models import LENGTHS, network
from support.tiny_models import left_padding, relative_error, tiny_model, token_ids

from slicegpt.errors import SliceGPTError
from slicegpt.runtime import Runtime, fuse_layers, to_canonical

# Together all kinds of routers, shared experts, biases and shortcuts.
FORMS = [
    ("mixtral", "varying"),
    ("qwen2-moe", "compact"),
    ("qwen3-moe", "dense"),
    ("olmoe", "varying"),
    ("phimoe", "dense shortcuts"),
    ("glm4-moe", "varying"),
    ("gpt-oss", "compact"),
]


@torch.no_grad()
@pytest.mark.parametrize(("case", "form"), FORMS)
def test_logits_are_those_of_the_plain_model(case, form):
    """Float64, as in test_runtime.py: 1e-12; with padding the angles of rotary positions are rounded to float32."""
    plain, ids = network(case, form), token_ids()
    runtime = Runtime(plain, prefill_chunk=5)
    assert relative_error(runtime.logits(ids), plain(ids).logits) < 1e-12
    ids, mask = left_padding(ids, LENGTHS)
    actual, expected = runtime.logits(ids, mask), plain(ids, attention_mask=mask).logits
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("case", "form"), FORMS)
def test_greedy_tokens_are_those_of_the_plain_model_in_float32(case, form):
    plain = network(case, form, torch.float32)
    ids, mask = left_padding(token_ids(), LENGTHS)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(ids, attention_mask=mask, **settings)
    for decoder in ("auto", "static"):
        runtime = Runtime(plain, prefill_chunk=5, decoder=decoder)
        assert torch.equal(runtime.generate(ids, mask, 12), expected)
    one = plain.generate(ids[:1], attention_mask=mask[:1], **settings)
    assert torch.equal(runtime.generate(ids[:1], max_new_tokens=12), one)


@torch.no_grad()
def test_released_weights_are_still_there():
    """The runtime's experts are the tensors of the model, which gives them up."""
    plain, ids = to_canonical(tiny_model("qwen2-moe")), token_ids()
    expected = plain(ids).logits
    runtime = Runtime(plain, release=True)
    assert plain.model.layers[0].mlp.experts.down_proj.is_meta
    assert relative_error(runtime.logits(ids), expected) < 1e-12


def test_bytes_of_a_token_are_those_of_its_experts():
    """Two of four experts for one row, all of them for two rows and more."""
    runtime = Runtime(tiny_model("mixtral", torch.float32))
    expert = 3 * 80 * 48 * 4
    assert runtime.bytes_per_token(2) - runtime.bytes_per_token(1) == 3 * 2 * expert
    assert runtime.bytes_per_token(3) == runtime.bytes_per_token(2)


def test_what_has_no_experts_says_so():
    model = to_canonical(tiny_model("mixtral", torch.float32))
    with pytest.raises(SliceGPTError, match="a mixture of experts is not supported by fuse_layers"):
        fuse_layers(model)
    with pytest.raises(SliceGPTError, match="'fused' has no mixtures of experts"):
        Runtime(model, decoder="fused").generate(token_ids(1), max_new_tokens=1)
