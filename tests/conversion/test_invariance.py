"""Folding and rotating at full width leaves every family's function unchanged (paper section 3.2)."""

import pytest
import torch
from support.tiny_models import (
    CASES,
    NORMS_BEHIND,
    SLICEABLE,
    left_padding,
    own_positions,
    relative_error,
    tiny_model,
    token_ids,
)

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.modeling import CACHE
from slicegpt.slicing import SlicingOptions, slice_model


def rotated(model, dtype=torch.float64, orientation="random", seed=3):
    """The same network, every boundary turned by its own random orthogonal matrix (or left as it is)."""
    fields = canonical_fields(model)
    widths = constant_widths(fields, model.config.hidden_size)
    mode = "compact" if orientation == "aligned" else "dense"
    config = plan(fields, widths, Shape(mode, orientation))
    return slice_model(model, config, (), SlicingOptions(dtype=dtype, orientation=orientation, seed=seed))[0]


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request):
    """A model, and its rotated form; the canonical one, where norms behind the blocks forbid a rotation."""
    model = tiny_model(request.param)
    return model, rotated(model, orientation="aligned" if request.param in NORMS_BEHIND else "random")


# Both networks are exact up to float64 rounding: some hundred roundings of 1e-16 over three layers stay below 1e-12;
# the contract is 1e-10.
TOLERANCE = 1e-10


@torch.no_grad()
def test_logits_equal_in_float64(pair):
    model, turned = pair
    ids = token_ids()
    assert relative_error(turned(ids).logits, model(ids).logits) < TOLERANCE


@torch.no_grad()
def test_logits_equal_with_left_padding(pair):
    model, turned = pair
    ids, mask = left_padding(token_ids(), [12, 7, 1])
    expected = model(ids, attention_mask=mask, **own_positions(model, mask)).logits
    actual = turned(ids, attention_mask=mask, **own_positions(turned, mask)).logits
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < TOLERANCE


@torch.no_grad()
def test_logits_equal_with_cache(pair):
    _, turned = pair
    ids = token_ids()
    whole = turned(ids).logits
    for network in pair:
        first = network(ids[:, :5], use_cache=True)
        second = network(ids[:, 5:9], use_cache=True, **{CACHE: first[CACHE]})
        third = network(ids[:, 9:], **{CACHE: second[CACHE]})
        stepped = torch.cat((first.logits, second.logits, third.logits), dim=1)
        assert relative_error(stepped, whole) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}]
)
def test_generation_equal(pair, settings):
    model, turned = pair
    ids, mask = left_padding(token_ids(), [12, 7, 3])
    outputs = []
    for network in (model, turned):
        torch.manual_seed(0)
        outputs.append(
            network.generate(
                ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **settings
            )
        )
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("case", SLICEABLE)
def test_logits_equal_in_float32(case):
    model = tiny_model(case, torch.float32)
    ids = token_ids()
    # float32 rounding (6e-8) through three random layers: observed 1e-6; the contract is 1e-4.
    assert relative_error(rotated(model, torch.float32)(ids).logits, model(ids).logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("case", sorted(CASES))
def test_untouched_dense_model_in_canonical_form(case):
    model = tiny_model(case)
    dense = rotated(model, orientation="aligned")
    assert set(dense.config.shortcuts) == {"identity"}
    ids = token_ids()
    assert relative_error(dense(ids).logits, model(ids).logits) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt", "phi", "qwen3-tied", "mistral-window"])
def test_eager_and_sdpa_attention_agree(case):
    turned = rotated(tiny_model(case))
    ids, mask = left_padding(token_ids(), [12, 7, 3])
    sdpa = turned(ids, attention_mask=mask).logits
    turned.set_attn_implementation("eager")
    eager = turned(ids, attention_mask=mask, output_attentions=True)
    assert relative_error(eager.logits[mask.bool()], sdpa[mask.bool()]) < TOLERANCE
    assert len(eager.attentions) == turned.config.num_hidden_layers


@pytest.mark.parametrize("case", SLICEABLE)
def test_rotation_is_real(case):
    """The weights did change: a test that compared a model with itself would prove nothing."""
    model = tiny_model(case)
    turned = rotated(model)
    layer, attention = checkpoint_of(model).layer(1), turned.model.layers[1].self_attn
    if layer.kv_a is not None:
        original, moved = layer.kv_a.weight, attention.kv_a_proj_with_mqa.weight
    else:
        original, moved = layer.q.weight, attention.q_proj.weight
    assert relative_error(moved, original) > 0.5
