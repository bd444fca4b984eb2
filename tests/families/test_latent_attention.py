"""Latent attention (DeepSeek): what it caches, how it is sliced, and what refuses it."""

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.checkpoint.gguf_network import architecture_of
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.quantization import WeightFormat, with_quantization
from slicegpt.conversion.stock import check_form
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields, facts_of
from slicegpt.modeling import CACHE, SlicedForCausalLM
from slicegpt.modeling.sizes import active_parameters, stored_parameters
from slicegpt.runtime import Runtime, fuse_layers, to_canonical
from slicegpt.serving.plugin import check_servable
from slicegpt.slicing import SlicingOptions, slice_model


@pytest.fixture(scope="module")
def dense():
    return tiny_model("deepseek-v3")


@pytest.fixture(scope="module")
def fields(dense):
    return canonical_fields(dense)


@torch.no_grad()
def test_the_cache_holds_what_transformers_keeps(dense):
    """The latent [batch, 1, tokens, 20] in the place of keys, the rotated part of the key in that of values; in the
    same order, for what transformers rotates as neighbours it keeps as halves."""
    ids = token_ids()
    theirs, ours = (network(ids, use_cache=True)[CACHE].layers[1] for network in (dense, to_canonical(dense)))
    assert ours.keys.shape == (3, 1, 12, 20)
    assert ours.values.shape == (3, 1, 12, 6)
    assert relative_error(ours.keys, theirs.keys) < 1e-12
    assert relative_error(ours.values, theirs.values) < 1e-12


@torch.no_grad()
def test_slicing_repairs_nothing_where_nothing_is_deleted(dense, fields):
    """The calibration tokens pass the block expanded, behind norms that no rotation reaches: all is as it was, to the
    rounding of the refit's solutions (as in test_families.py)."""
    config = plan(fields, constant_widths(fields, 48), Shape("dense", "random"))
    options = SlicingOptions(dtype=torch.float64, ridge=0.1, orientation="random")
    turned, _ = slice_model(dense, config, batches(), options)
    ids = token_ids()
    assert relative_error(turned(ids).logits, dense(ids).logits) < 1e-8
    inner = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(turned.state_dict()[inner], dense.state_dict()[inner])


@torch.no_grad()
def test_columns_and_neurons_are_deleted_and_saved(dense, fields, tmp_path):
    ids, config = token_ids(), plan(fields, constant_widths(fields, 36), Shape(neurons=0.25))
    options = SlicingOptions(dtype=torch.float64, ridge=0.1, neuron_multiple=2)
    sliced, _ = slice_model(dense, config, batches(), options)
    # Random weights have no directions to spare: a quarter of the columns costs what it costs, but no more than all.
    assert 1e-3 < relative_error(sliced(ids).logits, dense(ids).logits) < 1
    attention = sliced.model.layers[1].self_attn
    assert attention.kv_a_proj_with_mqa.weight.shape == (26, 36)
    assert attention.o_proj.weight.shape == (36, 4 * 8)
    assert sliced.model.layers[1].mlp.experts.down_proj.shape == (8, 36, sliced.config.neurons[1])
    assert sliced.config.neurons[1] < 24
    stored = stored_parameters(sliced.config)
    assert stored == sum(parameter.numel() for parameter in sliced.parameters())
    assert active_parameters(sliced.config) < stored
    sliced.save_pretrained(tmp_path)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path)
    # The same weights elsewhere in memory: products may add in another order.
    assert relative_error(loaded(ids).logits, sliced(ids).logits) < 1e-14
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    static = loaded.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, loaded.generate(ids, **settings))
    eager = loaded.eval()
    eager.set_attn_implementation("eager")
    outputs = eager(ids, output_attentions=True)
    assert len(outputs.attentions) == 3
    assert relative_error(outputs.logits, sliced(ids).logits) < 1e-12


@torch.no_grad()
def test_a_layer_loses_all_of_its_heads_or_none(dense, fields):
    config = plan(fields, constant_widths(fields, 48), kv_groups=[4, 0, 4])
    sliced, _ = slice_model(dense, config, batches(), SlicingOptions(dtype=torch.float64, ridge=0.1))
    assert sliced(token_ids()).logits.isfinite().all()
    assert [len(list(layer.self_attn.parameters())) for layer in sliced.model.layers] == [10, 1, 10]
    with pytest.raises(
        SliceGPTError, match="deepseek_v3 expands all heads from one latent: a layer keeps all of"
    ):
        plan(fields, constant_widths(fields, 48), kv_groups=2)


def test_what_has_no_place_for_it_refuses_it(fields):
    youtu = tiny_model("youtu", torch.float32)
    for make in (Runtime, lambda model: fuse_layers(to_canonical(model))):
        with pytest.raises(SliceGPTError, match=r"model: latent attention \(MLA\) is not supported"):
            make(youtu)
    canonical = to_canonical(youtu)
    with pytest.raises(ValueError, match="generate_batch: a paged cache holds keys and values of one size"):
        canonical.init_continuous_batching()
    with pytest.raises(ValueError, match=r"youtu: latent attention \(MLA\) is not supported: vLLM"):
        check_servable(canonical.config)
    with pytest.raises(SliceGPTError, match="quantize: has no form for latent attention"):
        with_quantization(canonical.config, WeightFormat(8))
    with pytest.raises(SliceGPTError, match="form: youtu has latent attention, and no stock form here"):
        check_form(canonical.config)
    with pytest.raises(SliceGPTError, match=r"gguf: .*no latent attention that this export writes"):
        architecture_of(canonical.config, "youtu")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("deepseek-v2", {"mlp_bias": True}, "deepseek_v2: mlp_bias=True is not supported beside experts"),
        ("deepseek-v2", {"norm_topk_prob": True}, "deepseek_v2: norm_topk_prob=True is not supported"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "deepseek_v2: topk_method must be 'greedy' or"),
        (
            "deepseek-v2",
            {"num_key_value_heads": 2},
            "deepseek_v2: num_key_value_heads must be num_attention_heads",
        ),
        (
            "deepseek-v3",
            {"num_experts_per_tok": 5},
            "deepseek_v3: num_experts_per_tok must be at most the 4 experts",
        ),
        (
            "deepseek-v3",
            {"n_shared_experts": 0},
            "deepseek_v3: n_shared_experts must be a whole number of at least 1",
        ),
        (
            "deepseek-v3",
            {"q_lora_rank": 0},
            "deepseek_v3: q_lora_rank must be a whole number of at least 1, got 0",
        ),
        (
            "glm4-moe-lite",
            {"mlp_layer_types": ["sparse"]},
            "glm4_moe_lite: mlp_layer_types must hold num_hidden",
        ),
    ],
)
def test_variants_that_cannot_be_represented_are_refused(case, changes, message):
    config = tiny_model(case).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(SliceGPTError, match=message):
        facts_of(config)
