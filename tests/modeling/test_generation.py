"""`generate` with a cache, with embeddings, and with a sliced model that drafts for its dense one."""

import copy

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import left_padding, tiny_model, token_ids
from transformers import DynamicCache, StaticCache

from slicegpt.modeling import CACHE, SlicedConfig, SlicedForCausalLM

CASES = ["llama", "llama-tied", "mistral-window", "opt", "phi"]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
NAMES = sorted({CACHE, "past_key_values"})  # transformers 5.24 takes both, 5.17 the second


@pytest.fixture(scope="module", params=CASES)
def small(request):
    return sliced(tiny_model(request.param), 36)[0]


@torch.no_grad()
def long_rope_model() -> SlicedForCausalLM:
    """Heads of 8 entries; positions beyond 16 take the long factors."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 3.5]}
    shape = {"vocab_size": 96, "dense_hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SlicedConfig(
        **shape, intermediate_size=48, boundary_widths=[24] * 4 + [32], shortcuts=["dense"] * 4,
        max_position_embeddings=64, rope_parameters=rope, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return SlicedForCausalLM(config).double().eval()


# --- a cache -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_prefix_in_the_cache_is_not_read_again(small, name, kind):
    ids = token_ids(1)
    cache = kind(config=small.config, **({"max_cache_len": 32} if kind is StaticCache else {}))
    small(ids[:, :7], use_cache=True, **{CACHE: cache})
    read = []
    hook = small.model.layers[0].register_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0].shape[1])
    )
    tokens = small.generate(ids, **{name: cache}, **GREEDY)
    hook.remove()
    assert read == [5] + [1] * 7  # 12 of the prompt less the 7 known, then the new ones but the last
    assert torch.equal(tokens, small.generate(ids, **GREEDY))


@torch.no_grad()
def test_a_conversation_goes_on_in_its_cache(small):
    """The cache that one call returns serves the next, longer, prompt."""
    ids = token_ids(1)
    first = small.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat((first.sequences, token_ids(1, 5, seed=1)), dim=1)
    tokens = small.generate(longer, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(tokens, small.generate(longer, **GREEDY))


# --- embeddings --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_embeddings_give_what_their_tokens_give(small, padded):
    ids, mask = left_padding(token_ids(), [12, 7, 3]) if padded else (token_ids(), torch.ones(3, 12).long())
    tokens = small.generate(ids, attention_mask=mask, **GREEDY)
    embeds = small.get_input_embeddings()(ids)
    assert torch.equal(small.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), tokens[:, 12:])
    both = small.generate(ids, inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(both, tokens)


# --- LongRoPE: a cache that has to be computed anew --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("embedded", [False, True])
def test_longrope_starts_anew_from_cache_and_embeddings(prefix, embedded):
    """12 tokens and 10 new ones cross the original length of 16."""
    model, ids = long_rope_model(), token_ids(1)
    expected = model.generate(ids, use_cache=False, **GREEDY | {"max_new_tokens": 10})
    cache = DynamicCache(config=model.config)
    if prefix:
        model(ids[:, :prefix], use_cache=True, **{CACHE: cache})
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embedded else {"inputs": ids}
    tokens = model.generate(**inputs, **{CACHE: cache}, **GREEDY | {"max_new_tokens": 10})
    assert torch.equal(tokens, expected[:, 12:] if embedded else expected)


@torch.no_grad()
def test_longrope_needs_all_tokens_to_start_anew():
    model, ids = long_rope_model(), token_ids(1)
    cache = DynamicCache(config=model.config)
    model(ids, use_cache=True, **{CACHE: cache})
    arguments = {CACHE: cache, "next_sequence_length": 5, "attention_mask": torch.ones(1, 17).long()}
    with pytest.raises(ValueError, match=r"17 tokens outgrows LongRoPE's 16.*got 5"):
        model.prepare_inputs_for_generation(token_ids(1, 5, seed=1), **arguments)


# --- speculative decoding ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_slice_drafts_for_its_dense_model(case):
    """Greedy speculative decoding gives the dense model's own tokens, whatever the draft proposes."""
    dense = tiny_model(case)
    draft, ids = sliced(dense, 36)[0], token_ids(1)
    proposed = []
    hook = draft.register_forward_hook(
        lambda module, inputs, outputs: proposed.append(outputs.logits.shape[1])
    )
    tokens = dense.generate(ids, assistant_model=draft, **GREEDY)
    hook.remove()
    assert proposed
    assert torch.equal(tokens, dense.generate(ids, **GREEDY))


@torch.no_grad()
def test_every_draft_of_the_same_model_is_accepted(small):
    """The sliced model as target, and a copy of it as its draft: n proposals and one more token a pass."""
    if small.config.sliding_window and CACHE == "past_key_values":
        pytest.skip("this transformers cannot take rejected tokens out of a cache with a sliding window")
    draft, ids = copy.deepcopy(small), token_ids(1)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    passes = []
    hook = small.register_forward_hook(lambda *_: passes.append(1))
    tokens = small.generate(ids, assistant_model=draft, **GREEDY | {"max_new_tokens": 10})
    hook.remove()
    assert len(passes) == 2
    assert torch.equal(tokens, small.generate(ids, **GREEDY | {"max_new_tokens": 10}))
