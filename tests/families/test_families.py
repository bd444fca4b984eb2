"""What is particular to a family. That every family's function is unchanged is tests/conversion/test_invariance.py."""

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import (
    GROWING_QUERIES,
    LONG_ROPE,
    left_padding,
    relative_error,
    tiny_model,
    token_ids,
)

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import Linear, canonical_fields, checkpoint_of
from slicegpt.families.rewriting import neighbours_to_halves
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.runtime import Runtime, to_canonical
from slicegpt.slicing import SlicingOptions, slice_model


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("phi", {"qk_layernorm": True}, "phi: qk_layernorm=True is not supported"),
        ("stablelm", {"qk_layernorm": True}, "stablelm: qk_layernorm=True"),
        ("cohere", {"use_qk_norm": True}, "cohere: use_qk_norm=True"),
        ("olmo", {"clip_qkv": 8.0}, r"olmo: clip_qkv=8\.0 is not supported"),
        ("gemma", {"use_bidirectional_attention": True}, "gemma: use_bidirectional_attention=True"),
        (
            "granite",
            {"embedding_multiplier": 0.0},
            "granite: embedding_multiplier must be finite and above 0",
        ),
        ("granite", {"logits_scaling": 0.0}, "granite: logits_scaling must be finite and not 0"),
        (
            "gpt-neox",
            {"head_dim": 16},
            r"gpt_neox: head_dim must be hidden_size / num_attention_heads = 12, got 16",
        ),
        (
            "stablelm",
            {"head_dim": 16},
            r"stablelm: head_dim must be hidden_size / num_attention_heads = 12, got 16",
        ),
        (
            "opt",
            {"num_attention_heads": 16},
            r"opt: hidden_size / num_attention_heads must be even, got 48 / 16 = 3",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "gpt2: scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "gpt2: add_cross_attention=True is not supported"),
        ("gpt2", {"num_attention_heads": 16}, "gpt2: hidden_size / num_attention_heads must be even"),
        ("falcon", {"alibi": True}, "falcon: alibi=True is not supported"),
        ("falcon-sequential", {"num_kv_heads": 2}, "falcon: num_kv_heads must be 4 where multi_query=False"),
        ("falcon-grouped", {"parallel_attn": False}, "falcon: parallel_attn=False is not supported"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "falcon: num_ln_in_parallel_attn=2 is not supported"),
        ("helium", {"head_dim": 16}, "helium: head_dim must be hidden_size / num_attention_heads = 12"),
        ("granite4", {"num_local_experts": 4}, "granitemoehybrid: num_local_experts=4 is not supported"),
        (
            "granite4",
            {"layer_types": ["linear_attention"] * 3},
            "granitemoehybrid: layer_types must be of 'full_attention'",
        ),
        (
            "ministral3",
            {"rope_parameters": GROWING_QUERIES | {"llama_4_scaling_beta": None}},
            "ministral3: rope_parameters: llama_4_scaling_beta must be a number, got None",
        ),
        ("cohere2", {"logit_scale": 0.0}, "cohere2: logit_scale must be finite and not 0"),
        ("llama", {"is_causal": False}, "llama: is_causal=False is not supported"),
        ("llama", {"hidden_act": "prelu"}, "llama: hidden_act must be one of gelu, .*, got 'prelu'"),
        ("opt", {"activation_function": "xielu"}, "opt: activation_function must be one of"),
        ("opt", {"do_layer_norm_before": False}, "opt: do_layer_norm_before=False"),
        ("opt", {"word_embed_proj_dim": 24}, "opt: word_embed_proj_dim must equal hidden_size 48, got 24"),
    ],
)
def test_variants_that_cannot_be_represented_are_refused(case, changes, message):
    model = tiny_model(case)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(SliceGPTError, match=message):
        canonical_fields(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "unit"), [("gemma", 48**0.5), ("granite", 12.0), ("granite-tied", 12.0), ("llama", 1.0)]
)
def test_the_stream_is_carried_in_units_of_the_embedding_scale(case, unit):
    """And so the embedding table, which a tied head shares, is the checkpoint's own."""
    model, ids = tiny_model(case), token_ids()
    canonical = to_canonical(model)
    assert torch.equal(canonical.get_input_embeddings().weight, model.get_input_embeddings().weight)
    theirs, ours = (network(ids, output_hidden_states=True).hidden_states for network in (model, canonical))
    for expected, actual in zip(theirs[:-1], ours[:-1], strict=True):  # the last one is behind the norm
        assert relative_error(actual * unit, expected) < 1e-12


def gemma_as_llama(state: dict, config) -> dict:
    state = {name: 1 + tensor if "norm" in name else tensor for name, tensor in state.items()}
    return state | {"model.embed_tokens.weight": state["model.embed_tokens.weight"] * 48**0.5}


def granite_as_llama(state: dict, config) -> dict:
    factors = {
        "embed_tokens": config.embedding_multiplier,
        "q_proj": config.attention_multiplier * 12**0.5,  # Llama divides by the root of a head's 12 entries
        "o_proj": config.residual_multiplier,
        "down_proj": config.residual_multiplier,
        "lm_head": 1 / config.logits_scaling,
    }
    return {name: tensor * factors.get(name.split(".")[-2], 1.0) for name, tensor in state.items()}


def phi3_as_llama(state: dict, config) -> dict:
    parts = {
        "qkv_proj": {"q_proj": 48, "k_proj": 24, "v_proj": 24},
        "gate_up_proj": {"gate_proj": 80, "up_proj": 80},
    }
    split = {}
    for name, tensor in state.items():
        for fused, sizes in parts.items():
            if fused in name:
                pieces = zip(sizes, tensor.split(tuple(sizes.values())), strict=True)
                split |= {name.replace(fused, part): rows for part, rows in pieces}
    return state | split


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "convert", "changes"),
    [
        ("gemma", gemma_as_llama, {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
        ("granite", granite_as_llama, {}),
        ("phi3-window", phi3_as_llama, {"rms_norm_eps": 1e-5}),
    ],
)
def test_slices_are_those_of_the_llama_that_computes_the_same(case, convert, changes):
    """Its factors are multiplied into its weights by hand. The unit of the stream changes neither directions nor fits.

    Covariances differ by rounding, amplified by eigenvalue gaps of about 1e-3: 1e-8, as in slicing/test_slicer.py.
    """
    model = tiny_model(case, tie_word_embeddings=False, sliding_window=None)
    llama = tiny_model("llama", **changes)
    state = convert(model.state_dict(), model.config)
    llama.load_state_dict({name: state[name] for name in llama.state_dict()})
    ids = token_ids()
    assert relative_error(llama(ids).logits, model(ids).logits) < 1e-12

    calibration = batches()
    logits = []
    for network in (model, llama):
        fields = canonical_fields(network)
        config = plan(fields, constant_widths(fields, 36), Shape())
        options = SlicingOptions(dtype=torch.float64, ridge=0.1)
        logits.append(slice_model(network, config, calibration, options)[0](ids).logits)
    assert relative_error(*logits) < 1e-8
    assert relative_error(logits[0], model(ids).logits) > 1e-3  # slicing did something


@torch.no_grad()
def test_gemma_folds_the_root_that_transformers_multiplies_by():
    """In bfloat16 the root of 48 is 6.9375, 0.13 % off: both networks with the rounded weights, in float64."""
    half = tiny_model("gemma", torch.bfloat16)
    layer = checkpoint_of(half).layer(0)
    assert relative_error(layer.o.weight * 6.9375, half.model.layers[0].self_attn.o_proj.weight) < 1e-12


# --- LongRoPE ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("original", [32, 8])
def test_longrope_takes_the_long_factors_past_the_original_length(original):
    """12 tokens: below 32, above 8."""
    rope = LONG_ROPE | {"original_max_position_embeddings": original}
    model = tiny_model("phi3-long", rope_parameters=rope, original_max_position_embeddings=original)
    ids = token_ids()
    expected = model(ids).logits
    assert relative_error(to_canonical(model)(ids).logits, expected) < 1e-10
    other = tiny_model("phi3-long")(ids).logits
    assert (relative_error(other, expected) < 1e-10) == (original == 32)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_generation_past_the_original_length_turns_all_keys_anew(padded):
    """32 tokens: 12 of a prompt and 30 new ones, greedy, with a cache and without one."""
    canonical = to_canonical(tiny_model("phi3-long"))
    ids, mask = left_padding(token_ids(), [12, 7, 3]) if padded else (token_ids(), torch.ones(3, 12).long())
    tokens = [
        canonical.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=30,
            min_new_tokens=30,
            pad_token_id=0,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_the_runtime_goes_as_far_as_longrope_keeps_its_frequencies():
    model = tiny_model("phi3-long")
    runtime = Runtime(model)
    assert runtime.max_length == 32 < model.config.max_position_embeddings
    ids = token_ids(1, 20)
    expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(runtime.generate(ids, max_new_tokens=12, ignore_eos=True), expected)
    with pytest.raises(SliceGPTError, match="at most 32, the length at which the model's LongRoPE changes"):
        Runtime(model, max_length=33)


# --- queries that grow with their position --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_generation_past_the_length_from_which_queries_grow(padded):
    """12 tokens of a prompt and 30 new ones, where queries grow from token 32 on; and where they never do."""
    model = tiny_model("ministral3", torch.float32)
    canonical = to_canonical(model)
    ids, mask = left_padding(token_ids(), [12, 7, 3]) if padded else (token_ids(), torch.ones(3, 12).long())
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0}
    tokens = [network.generate(ids, attention_mask=mask, **settings) for network in (model, canonical)]
    assert torch.equal(*tokens)
    expected = model(tokens[0]).logits
    assert relative_error(canonical(tokens[0]).logits, expected) < 1e-5
    rope = GROWING_QUERIES | {"llama_4_scaling_beta": 0.0}
    constant = tiny_model("ministral3", torch.float32, rope_parameters=rope)(tokens[0]).logits
    assert relative_error(constant[:, :32], expected[:, :32]) < 1e-5
    assert relative_error(constant[:, 32:], expected[:, 32:]) > 1e-3


@torch.no_grad()
def test_slicing_reads_the_positions_that_queries_grow_with():
    """Full width, but the stream goes block by block through the calibration: the refit finds nothing to repair."""
    rope = GROWING_QUERIES | {"original_max_position_embeddings": 4}
    model, ids = tiny_model("ministral3", rope_parameters=rope), token_ids()
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 48), Shape("dense", "random"))
    options = SlicingOptions(dtype=torch.float64, ridge=0.1, orientation="random")
    turned, _ = slice_model(model, config, batches(), options)
    assert relative_error(turned(ids).logits, model(ids).logits) < 1e-8


def test_the_runtime_goes_as_far_as_queries_stay_as_they_are():
    model = tiny_model("ministral3", torch.float32)
    assert Runtime(model).max_length == 32
    with pytest.raises(SliceGPTError, match="at most 32, the length past which the model's queries grow"):
        Runtime(model, max_length=33)


@torch.no_grad()
def test_an_activation_with_weights_is_sliced_and_saved(tmp_path):
    """Its numbers are a layer's and not a neuron's: they stay as they are where neurons are deleted."""
    model = tiny_model("apertus", torch.float32)
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 36), Shape(neurons=0.25))
    sliced, _ = slice_model(model, config, batches(), SlicingOptions(dtype=torch.float32, ridge=0.1))
    sliced.save_pretrained(tmp_path)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(token_ids()).logits, sliced(token_ids()).logits)
    theirs, ours = (network.model.layers[1].mlp for network in (model, loaded))
    assert ours.up_proj.out_features < theirs.up_proj.out_features
    for name, tensor in theirs.act_fn.state_dict().items():
        assert torch.equal(ours.act_fn.state_dict()[name], tensor)


# --- rewriting ---------------------------------------------------------------------------------------------------


def test_rotary_pairs_of_neighbours_become_pairs_of_halves():
    rows = torch.arange(12.0)
    linear = neighbours_to_halves(Linear(rows[:, None].expand(12, 2), rows), head_dim=6)
    assert linear.bias.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(linear.weight[:, 0], linear.bias)


def test_an_untied_head_that_is_missing_is_not_taken_for_a_tied_one():
    checkpoint = checkpoint_of(tiny_model("gpt-neox"))
    checkpoint.tensors = {
        name: tensor for name, tensor in checkpoint.tensors.items() if "lm_head" not in name
    }
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        _ = checkpoint.head


def test_weights_that_a_family_has_no_place_for():
    """A module that somebody has added, or an adapter that is not merged: slicing would drop them."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(SliceGPTError, match=r"has no place for: model\.layers\.1\.mlp\.extra\.bias, "):
        canonical_fields(model)


def test_an_adapter_must_be_merged_first():
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(SliceGPTError, match="an adapter is loaded into it; merge it into the weights first"):
        canonical_fields(model)
