"""The sliced model as a Hugging Face citizen: saving, sharding, generation, training."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.sliced_models import sliced
from support.tiny_models import left_padding, relative_error, tiny_model, token_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from slicegpt import SlicedConfig, SlicedForCausalLM
from slicegpt.checkpoint.saving import stored_size
from slicegpt.modeling import CACHE
from slicegpt.modeling.sizes import stored_parameters

CASES = ["llama", "llama-tied", "mistral-window", "opt", "phi"]


@pytest.fixture(scope="module", params=CASES)
def small(request):
    return sliced(tiny_model(request.param, torch.float32), 36, dtype=torch.float32)[0]


@torch.no_grad()
def test_reload_is_bit_identical_in_a_new_process(small, tmp_path):
    ids = token_ids()
    small.save_pretrained(tmp_path / "model")
    torch.save((ids, small(ids).logits), tmp_path / "expected.pt")
    script = """
import sys, torch, slicegpt
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids, expected = torch.load(folder + "/expected.pt")
model = AutoModelForCausalLM.from_pretrained(folder + "/model")
assert type(model).__name__ == "SlicedForCausalLM", type(model)
assert torch.equal(model(ids).logits, expected)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stored_elements_are_what_is_counted(small, tmp_path):
    small.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    elements = sum(tensor.numel() for shard in shards for tensor in load_file(shard).values())
    assert elements == stored_size(tmp_path).parameters == stored_parameters(small.config)
    assert stored_size(tmp_path).bytes == 4 * elements
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), reloaded.parameters(), strict=True))


def test_config_round_trip(small, tmp_path):
    small.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SlicedConfig)
    config.name_or_path = small.config.name_or_path
    assert config.to_dict() == small.config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "slicegpt"


def test_auto_model_gives_the_trunk(small, tmp_path):
    small.save_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(trunk(ids).last_hidden_state, small.model(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_cache_equals_generation_without(small, padded):
    ids = token_ids()
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = left_padding(ids, [12, 7, 3])
    settings = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    outputs = [small.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_the_cache_has_its_new_and_its_old_name(small, name):
    ids = token_ids()
    cache = DynamicCache(config=small.config)
    first = small(ids[:, :8], use_cache=True, **{name: cache})
    assert first[CACHE] is cache
    assert cache.get_seq_length() == 8
    second = small(ids[:, 8:], **{name: cache}).logits
    # Fewer rows at a time: other kernels, float32 rounding through three layers.
    assert relative_error(torch.cat((first.logits, second), dim=1), small(ids).logits) < 1e-5


@torch.no_grad()
def test_static_cache(small):
    ids = token_ids()
    cache = StaticCache(config=small.config, max_cache_len=16)
    first = small(ids[:, :8], use_cache=True, **{CACHE: cache}).logits
    second = small(ids[:, 8:], use_cache=True, **{CACHE: cache}).logits
    # The static cache masks instead of cutting: other kernels, float32 rounding through three layers.
    assert relative_error(torch.cat((first, second), dim=1), small(ids).logits) < 1e-5


@torch.no_grad()
def test_logits_to_keep_and_inputs_embeds(small):
    ids = token_ids()
    whole = small(ids).logits
    assert relative_error(small(ids, logits_to_keep=2).logits, whole[:, -2:]) < 1e-5
    embeds = small.get_input_embeddings()(ids)
    assert torch.equal(small(inputs_embeds=embeds).logits, whole)
    hidden = small(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == small.config.num_hidden_layers + 1


def test_gradient_checkpointing_gives_the_same_gradients(small):
    small, ids = copy.deepcopy(small), token_ids()  # some releases of transformers leave hooks behind
    gradients = []
    small.train()
    for checkpointing in (False, True):
        if checkpointing:
            small.gradient_checkpointing_enable()
        small.zero_grad()
        small(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in small.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0] if gradient.numel())
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-5 or not one.numel()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, ids = sliced(tiny_model("llama", torch.float32), 36, dtype=torch.float32)[0], token_ids()
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_fresh_model_from_config_runs():
    """Without a checkpoint: initialised weights, as `AutoModelForCausalLM.from_config` promises."""
    config = SlicedConfig(
        vocab_size=40,
        dense_hidden_size=32,
        boundary_widths=[24, 24, 24, 24, 32],
        shortcuts=["compact", "dense", "compact", "compact"],
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, SlicedForCausalLM)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_a_fresh_model_carries_its_stream():
    """Dense shortcuts and projections start as the identity: noise would damp the stream at every block."""
    tied = {"tie_word_embeddings": True, "embed_projection": True, "final_norm_weight": True}
    shape = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = SlicedConfig(
        **shape, **tied, dense_hidden_size=32, boundary_widths=[24, 20, 28], shortcuts=["dense"] * 2
    )
    network = SlicedForCausalLM(config).model
    layer = network.layers[0]
    carriers = [
        network.embed_projection,
        layer.attention_shortcut,
        layer.mlp_shortcut,
        network.head_projection,
    ]
    for carrier, shape in zip(carriers, [(24, 32), (20, 24), (28, 20), (32, 28)], strict=True):
        assert torch.equal(carrier.weight, torch.eye(*shape))
    assert 0 < layer.self_attn.o_proj.weight.std() < 0.03  # all else as transformers has it


@pytest.mark.skipif(CACHE == "past_key_values", reason="this transformers records all hidden states or none")
@torch.no_grad()
def test_hidden_states_of_some_layers(small):
    ids = token_ids()
    whole = small(ids, output_hidden_states=True).hidden_states
    some = small(ids, output_hidden_states=[0, -1]).hidden_states
    assert len(some) == len(whole)
    assert torch.equal(some[0], whole[0])
    assert torch.equal(some[-1], whole[-1])
    assert not any(isinstance(state, torch.Tensor) for state in some[1:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundary_widths": [24, 24]}, "boundary_widths must hold 5 widths, got 2"),
        ({"boundary_widths": [40] * 5}, r"must lie in \[1, 32\]"),
        ({"shortcuts": ["identity", "round", "dense", "dense"]}, "shortcuts must hold 4 of"),
        ({"no_rope_layers": [1]}, r"no_rope_layers must hold 2 of 0 and 1, one a layer, got \[1\]"),
        ({"no_rope_layers": [1, 2]}, "no_rope_layers must hold 2 of 0 and 1"),
        (
            {"boundary_widths": [24, 16, 24, 24, 32], "shortcuts": ["compact"] * 4},
            r"shortcuts\[0\] cannot be",
        ),
        ({"position_embedding": "alibi"}, "must be 'rotary', 'learned' or 'none', got 'alibi'"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    fields = {"dense_hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | changes
    with pytest.raises(Exception, match=message):
        SlicedConfig(**fields)


def test_a_config_of_before_means_what_it_did():
    """Checkpoints written without these fields: all layers have rotary positions, norms come before them."""
    fields = SlicedConfig(dense_hidden_size=32, num_hidden_layers=2, num_attention_heads=2).to_dict()
    older = {
        name: value for name, value in fields.items() if name not in ("no_rope_layers", "qk_norm_after_rope")
    }
    config = SlicedConfig.from_dict(older)
    assert config.uses_rope(0)
    assert config.uses_rope(1)
    assert not config.qk_norm_after_rope
    assert config.query_scaling is None


def test_compiles_without_graph_breaks(small):
    """The whole forward pass is one graph."""
    ids = token_ids()
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(ids, use_cache=False).logits, small(ids).logits) < 1e-6


def test_weights_are_initialised_on_their_own_device():
    """vLLM makes the network of meta tensors while the default device is another."""
    model, _ = sliced(tiny_model("llama"), 36, shortcut="dense")
    with torch.device("meta"):
        empty = type(model)(model.config)
    fresh = [module for module in empty.modules() if getattr(module, "starts_as_identity", False)]
    assert fresh
    with torch.device("cpu"):
        for module in fresh:
            module.weight._is_hf_initialized = False
            empty._init_weights(module)
            assert module.weight.is_meta
