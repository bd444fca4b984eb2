"""`fuse_layers`: the plain model whose layers call the fused operators is the same model."""

import pytest
import torch
from support.sliced_models import CASE_FORMS, LENGTHS, network
from support.tiny_models import left_padding, relative_error, tiny_model, token_ids

from slicegpt import ops
from slicegpt.errors import SliceGPTError
from slicegpt.runtime import Runtime, fuse_layers, to_canonical, unfuse_layers


@torch.no_grad()
@pytest.mark.parametrize(("case", "form"), CASE_FORMS)
def test_same_logits(case, form):
    """Float64: some hundred roundings of 1e-16; padding and masks are attention's own business, as before."""
    model = to_canonical(network(case, form))
    if model.config.attention_sinks:
        with pytest.raises(SliceGPTError, match="attention sinks is not supported by fuse_layers"):
            fuse_layers(model)
        return
    ids, mask = left_padding(token_ids(), LENGTHS)
    expected = model(ids, attention_mask=mask).logits
    assert fuse_layers(model) is model
    actual = model(ids, attention_mask=mask).logits
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-12
    assert not torch.equal(actual, expected)  # another order of operations
    assert torch.equal(unfuse_layers(model)(ids, attention_mask=mask).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt", "phi", "qwen3-tied"])
def test_same_tokens_from_generate(case):
    model = network(case, "compact", torch.float32)
    ids, mask = left_padding(token_ids(), LENGTHS)
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **arguments)
    assert torch.equal(fuse_layers(model).generate(ids, **arguments), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "opt"])
def test_half_precision_errs_no_more_than_twice_the_plain_layers(case, dtype):
    model, ids = network(case, "compact", dtype), token_ids(4, 24)
    exact = type(model)(model.config).double()
    exact.load_state_dict(model.state_dict())
    expected = exact.eval()(ids).logits
    plain = relative_error(model(ids).logits, expected)
    assert relative_error(fuse_layers(model)(ids).logits, expected) < 2 * plain


@torch.no_grad()
def test_layers_call_the_operators(monkeypatch):
    """Two of each a layer; within a layer `norm_linear` reads the sums of squares that `rotate_add` wrote."""
    model, given = fuse_layers(network("llama", "compact", torch.float32)), []
    norm_linear = ops.norm_linear
    monkeypatch.setattr(ops, "norm_linear", lambda *a: given.append(a[3] is not None) or norm_linear(*a))
    model(token_ids())
    assert given == [False, True] * 3


@torch.no_grad()
def test_saving_and_releasing(tmp_path):
    model, ids = network("qwen3-tied", "compact", torch.float32), token_ids()
    expected = model(ids).logits
    fuse_layers(model).save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, expected)
    fuse_layers(unfuse_layers(model), release=True)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert relative_error(model(ids).logits, expected) < 1e-5


def test_errors():
    with pytest.raises(SliceGPTError, match="model: must be a SlicedForCausalLM, got LlamaForCausalLM"):
        fuse_layers(tiny_model("llama"))
    model = fuse_layers(network("llama", "compact"))
    with pytest.raises(SliceGPTError, match=r"must run under torch.no_grad\(\)"):
        model(token_ids())
    model.config.hidden_act = "tanh"
    with pytest.raises(SliceGPTError, match="activation 'tanh' is not supported"):
        fuse_layers(model)


@pytest.mark.parametrize("use", [fuse_layers, Runtime])
def test_a_model_in_several_places_is_refused(use):
    plain = network("llama", "compact", torch.float32)
    plain.model.layers[1].to("meta")  # what an offloaded layer looks like
    with pytest.raises(SliceGPTError, match="model: must be on one device, got cpu, meta"):
        use(plain)
