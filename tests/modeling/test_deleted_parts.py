"""Layers that keep some of their key/value heads, or no attention or MLP: network, caches, runtime, files."""

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import (
    NORMS_BEHIND,
    left_padding,
    own_positions,
    relative_error,
    tiny_model,
    token_ids,
)
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from slicegpt.cli.info import describe
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.layers import CACHE
from slicegpt.ops import quantized
from slicegpt.runtime import Runtime, fuse_layers, unfuse_layers
from slicegpt.serving.plugin import heads_of_rank
from slicegpt.slicing import SlicingOptions, slice_model

# Grouped heads, biases, windows in some layers, q/k norms; learned positions; parallel blocks; a head of each key head;
# fused projections; layers without rotary positions; norms behind blocks, capped scores; one norm over all heads.
CASES = [
    "llama-biased",
    "qwen2",
    "qwen3-tied",
    "opt",
    "phi",
    "gpt-neox-sequential",
    "falcon-grouped",
    "smollm3-window",
    "gemma2",
    "gemma3",
]
NEW = 6


def made(
    case: str,
    dtype=torch.float64,
    width: int = 40,
    kept=None,
    neurons=(80, 0, 40),
    group_heads=None,
    **changes,
):
    """A sliced tiny model whose first layer has no attention, whose second has no MLP and fewer heads."""
    model = tiny_model(case, dtype, **changes)
    fields = canonical_fields(model)
    groups = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    kept = (0, groups - 1, groups) if kept is None else kept
    width = 48 if case in NORMS_BEHIND else width
    neurons = [count * fields["intermediate_size"] // 80 for count in neurons]
    config = plan(fields, constant_widths(fields, width), Shape(round_to=4), neurons, kept, group_heads)
    return slice_model(model, config, batches(4), SlicingOptions(dtype, ridge=0.3))[0]


@pytest.fixture(scope="module", params=CASES)
def network(request):
    return made(request.param)


def greedy(model, ids, **inputs):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **inputs)


@torch.no_grad()
def without_cache(model, ids, mask=None):
    for _ in range(NEW):
        positions = {} if mask is None else own_positions(model, mask)
        logits = model(ids, attention_mask=mask, use_cache=False, **positions).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
        mask = None if mask is None else torch.cat((mask, mask[:, -1:]), dim=1)
    return ids


@torch.no_grad()
def test_generation_with_every_cache(network, tmp_path):
    """Token by token as without a cache: dynamic, static, beams (which reorder it), padded rows, the runtime's own; and
    from the saved folder."""
    ids = token_ids()
    expected = without_cache(network, ids)
    assert torch.equal(greedy(network, ids), expected)
    assert torch.equal(greedy(network, ids, cache_implementation="static"), expected)
    padded, mask = left_padding(ids, [12, 7, 3])
    assert torch.equal(greedy(network, padded, attention_mask=mask), without_cache(network, padded, mask))
    runtime = Runtime(network)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True), expected)
    beams = greedy(network, ids, num_beams=3)
    assert torch.equal(greedy(network, ids, num_beams=3, use_cache=False), beams)
    network.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for field in ("key_value_heads", "neurons", "layer_types", "attention_types", "shortcuts"):
        assert getattr(again.config, field) == getattr(network.config, field)
    assert torch.equal(again(ids).logits, network(ids).logits)
    assert describe(str(tmp_path))["key_value_heads"] == network.config.key_value_heads


@torch.no_grad()
def test_runtime_and_fused_layers(network):
    """The same logits; no norm, no product and no place in the cache for what is gone."""
    ids = token_ids()
    expected = network(ids).logits
    runtime = Runtime(network)
    assert relative_error(runtime.logits(ids), expected) < 1e-10
    packed, config = runtime.executor.packed, network.config
    attending = [one.attention for block in packed.blocks for one in block.inputs if one.attention]
    assert [attention.layer for attention in attending] == [1, 2]
    assert [attention.key_heads for attention in attending] == config.key_value_heads[1:]
    # Constants are in the biases of the blocks before, where no norm stands behind these.
    assert all(block.inputs for block in packed.blocks) or config.post_norm
    fuse_layers(network)
    assert relative_error(network(ids).logits, expected) < 1e-10
    assert torch.equal(greedy(network, ids), without_cache(network, ids))
    unfuse_layers(network)


@torch.no_grad()
@pytest.mark.parametrize("width", [48, 36])
@pytest.mark.parametrize("case", ["llama-biased", "opt", "phi", "mistral-window"])
def test_the_compiled_step(case, width):
    """float32 through the CPU's one call for all blocks, where its kernels are built."""
    network = made(case, torch.float32, width)
    runtime, ids = Runtime(network), token_ids(2)
    # Some tens of roundings to float32 in each of six blocks; the same tokens unless two logits are that close.
    assert relative_error(runtime.logits(ids), network(ids).logits) < 1e-5
    tokens = runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True)
    assert torch.equal(tokens, without_cache(network, ids))
    if Runtime(tiny_model(case, torch.float32)).decoder_name(2) == "fused":
        assert runtime.decoder_name(2) == "fused"


def test_caches_shrink():
    network = made("llama", kept=(0, 1, 2))
    ids = token_ids()
    for cache in (DynamicCache(config=network.config), StaticCache(config=network.config, max_cache_len=16)):
        network(ids, **{CACHE: cache})
        assert cache.get_seq_length() == 12
        held = [layer.keys.shape[:2] for layer in cache.layers if layer.keys is not None]
        assert held == [(3, 1), (3, 2)]
    runtime = Runtime(network)
    mine, dense = runtime.new_cache(2, 64), Runtime(tiny_model("llama")).new_cache(2, 64)
    assert mine.keys.numel() == dense.keys.numel() // 2
    assert [states.shape[1] for states in (mine.of_layer(layer)[0] for layer in range(3))] == [0, 1, 2]


def test_kinds_of_attention():
    """A layer's kind is what it was; caches see those with attention first."""
    network = made("qwen2", kept=(0, 1, 2), width=48)
    config = network.config
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.attention_types == kinds
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert [config.cache_index(layer) for layer in (1, 2)] == [0, 1]
    assert SlicedConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["qwen3-tied", "phi"])
def test_smaller_groups(case, dtype, tmp_path):
    """Groups of one query head in two layers and of two in another: every cache, the runtime, the file."""
    network = made(case, dtype, kept=(2, 1, 2), neurons=(80, 80, 80), group_heads=(1, 2, 1))
    ids = token_ids()
    logits, expected = network(ids).logits, without_cache(network, ids)
    assert torch.equal(greedy(network, ids), expected)
    assert torch.equal(greedy(network, ids, cache_implementation="static"), expected)
    runtime = Runtime(network)
    assert torch.equal(runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True), expected)
    # As in the tests above, by the dtype.
    assert relative_error(runtime.logits(ids), logits) < (1e-10 if dtype == torch.float64 else 1e-5)
    network.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.config.attention_heads == [2, 2, 2]
    assert torch.equal(again(ids).logits, logits)


@torch.no_grad()
def test_a_parallel_block_of_nothing():
    """Both parts gone: a constant, added to the bias of the block before it, or to the embedding; the last one leads to
    the head's width, and stays."""
    for kept, neurons in (((2, 0, 2), (80, 0, 80)), ((0, 2, 0), (0, 80, 0))):
        network = made("phi", width=40, kept=kept, neurons=neurons)
        assert len(Runtime(network).executor.packed.blocks) == 2
        ids = token_ids()
        assert relative_error(Runtime(network).logits(ids), network(ids).logits) < 1e-10
        assert torch.equal(greedy(network, ids), without_cache(network, ids))


@torch.no_grad()
def test_widths_that_change_past_deleted_blocks():
    """Compact shortcuts alone, dense ones, padding at the end: each block's shortcut is still made."""
    model = tiny_model("llama")
    fields = canonical_fields(model)
    widths = [32, 36, 40, 36, 40, 40, 48]
    config = plan(fields, widths, Shape(round_to=4), [0, 0, 0], (0, 2, 0))
    network, _ = slice_model(model, config, batches(), SlicingOptions(torch.float64, ridge=0.3))
    ids = token_ids()
    runtime = Runtime(network)
    assert relative_error(runtime.logits(ids), network(ids).logits) < 1e-10
    assert torch.equal(
        runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True), without_cache(network, ids)
    )


@torch.no_grad()
@pytest.mark.skipif(not quantized.is_supported(None, torch.float32), reason="the CPU's kernels are not built")
@pytest.mark.parametrize("case", ["llama", "phi"])
def test_weights_of_fewer_bits(case):
    """8 bits and one scale a row beside constants and fewer heads: a row's numbers are off by half of 1/128 of its
    largest, its products by about that over √K of themselves; six such blocks stay within a tenth."""
    network, ids = made(case, torch.float32, group_heads=(2, 1, 1)), token_ids(2)
    runtime = Runtime(network, weights="int8")
    assert relative_error(runtime.logits(ids), network(ids).logits) < 0.1
    assert runtime.generate(ids, max_new_tokens=NEW, ignore_eos=True).shape == (2, 12 + NEW)


@torch.no_grad()
def test_training():
    """Gradients reach what is left; a block of nothing passes them on."""
    network = made("llama", torch.float32).train()
    ids = token_ids()
    with torch.enable_grad():
        network(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_group_heads": [1]}, r"layer_group_heads must hold 2 numbers in \[1, 2\], got \[1\]"),
        ({"layer_group_heads": [2, 0]}, r"layer_group_heads must hold 2 numbers in \[1, 2\], got"),
        ({"layer_key_value_heads": [1]}, r"layer_key_value_heads must hold 2 numbers in \[0, 2\], got \[1\]"),
        ({"layer_key_value_heads": [3, 1]}, r"layer_key_value_heads must hold 2 numbers in \[0, 2\], got"),
        (
            {"layer_key_value_heads": [0, 0]},
            "layer_key_value_heads must leave attention to one layer at least",
        ),
        ({"dense_layer_types": ["full_attention"]}, "dense_layer_types must hold 2 kinds, got"),
        ({"layer_neurons": [0, -1]}, "layer_neurons must hold 2 numbers of at least 0"),
    ],
)
def test_impossible_configs(changes, message):
    fields = {
        "dense_hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    with pytest.raises(Exception, match=message):
        SlicedConfig(**fields, **changes)


def test_what_cannot_share_heads_says_so():
    network = made("llama", kept=(1, 2, 2))
    with pytest.raises(
        ValueError, match="generate_batch: layers must have all of their heads, got layer_key_value"
    ):
        network.generate_batch([[5, 6, 7]], max_new_tokens=2)
    assert heads_of_rank(network.config, 1, 2) == (2, 1)
    assert heads_of_rank(network.config, 0, 2) == (1, 1)
    with pytest.raises(ValueError, match="tensor_parallel_size must divide the 2 query heads of layer 0"):
        heads_of_rank(network.config, 0, 4)
