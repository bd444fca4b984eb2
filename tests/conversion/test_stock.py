"""The stock form computes what the sliced model does, in the dense model's own class, or is refused."""

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import in_float64, relative_error, tiny_model, token_ids

from slicegpt.checkpoint.stock_model import load_stock, stock_of
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.size_plan import plan_recipe
from slicegpt.conversion.stock import check_form, check_stock, stock_parameters
from slicegpt.conversion.stock_plan import untied
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields, checkpoint_of, source_of
from slicegpt.recipe import Recipe
from slicegpt.slicing import SlicingOptions, slice_model

# One of every way of writing a layer, of norms, biases and heads.
WRITINGS = (
    *(
        "llama-biased",
        "qwen2",
        "qwen3-tied",
        "opt",
        "opt-no-bias",
        "phi",
        "phi3-window",
        "gemma",
        "granite-tied",
    ),
    *(
        "gpt-neox",
        "stablelm-parallel",
        "olmo",
        "cohere",
        "gpt2-untied",
        "falcon",
        "falcon-grouped",
        "nemotron",
    ),
    *("glm", "ernie", "granite4", "hunyuan", "apertus", "helium"),
)
NARROW = ("llama-tied", "qwen3-tied", "phi3-window", "gemma", "granite-tied", "glm", "hunyuan", "apertus")
OPTIONS = SlicingOptions(dtype=torch.float64, ridge=0.3, allocate="uniform")


def stock_pair(model, fields, width, neurons, groups=None):
    """The sliced model and its stock form, both in float64."""
    shape = Shape(form="stock", round_to=8)
    config = plan(fields, constant_widths(fields, width, True), shape, neurons, groups)
    check_stock(config, source_of(model))
    sliced, _ = slice_model(model, config, batches(2), OPTIONS)
    stock = load_stock(stock_of(source_of(sliced), checkpoint_of(model)), torch.float64, None)
    return sliced, in_float64(stock)


@torch.no_grad()
@pytest.mark.parametrize("case", WRITINGS)
def test_it_computes_what_the_sliced_model_does(case):
    """Factors go from one weight to another: some roundings of float64, as tests/conversion/test_invariance.py."""
    model, ids = tiny_model(case), token_ids()
    fields = canonical_fields(model)
    sliced, stock = stock_pair(model, fields, 48, fields["intermediate_size"] - 16)
    assert type(stock) is type(model)
    assert relative_error(stock(ids).logits, sliced(ids).logits) < 1e-12
    assert sum(p.numel() for p in stock.parameters()) == stock_parameters(sliced.config, model.config)


@torch.no_grad()
@pytest.mark.parametrize("case", NARROW)
def test_columns_go_where_no_norm_and_no_tied_head_needs_them(case):
    model, ids = tiny_model(case), token_ids()
    fields = canonical_fields(model)
    if fields["tie_word_embeddings"]:
        fields = untied(fields)
    sliced, stock = stock_pair(model, fields, 40, 64)
    assert stock.config.hidden_size == 40
    assert stock.config.head_dim == sliced.config.head_dim
    assert relative_error(stock(ids).logits, sliced(ids).logits) < 1e-12
    assert sum(p.numel() for p in stock.parameters()) == stock_parameters(sliced.config, model.config)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-tied", "qwen3-tied", "phi3-window", "glm"])
def test_heads_go_in_all_layers_alike(case):
    model, ids = tiny_model(case), token_ids()
    sliced, stock = stock_pair(model, canonical_fields(model), 48, 64, 1)
    assert (stock.config.num_attention_heads, stock.config.num_key_value_heads) == (2, 1)
    assert stock.config.head_dim == sliced.config.head_dim
    assert relative_error(stock(ids).logits, sliced(ids).logits) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3-window"])
def test_query_heads_go_from_all_groups_alike(case):
    """Two groups of one query head each, in the class's own order of rows."""
    model, ids = tiny_model(case), token_ids()
    fields = canonical_fields(model)
    shape = Shape(form="stock", round_to=8, group_heads=1)
    config = plan(fields, constant_widths(fields, 48, True), shape)
    sliced, _ = slice_model(model, config, batches(2), OPTIONS)
    stock = in_float64(load_stock(stock_of(source_of(sliced), checkpoint_of(model)), torch.float64, None))
    assert relative_error(stock(ids).logits, sliced(ids).logits) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-biased", "opt", "nemotron", "gemma"])
def test_with_nothing_deleted_it_is_the_dense_model(case):
    model, ids = tiny_model(case), token_ids()
    fields = canonical_fields(model)
    _, stock = stock_pair(model, fields, 48, fields["intermediate_size"])
    assert relative_error(stock(ids).logits, model(ids).logits) < 1e-12


def test_the_basis_is_that_of_all_boundaries():
    """The leading eigenvectors of the sum of all streams' covariances, each with a trace of 1, from transformers' own
    hidden states (behind attention and behind the MLP of every layer)."""
    model = tiny_model("llama")
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 40, True), Shape(form="stock", round_to=8), 80)
    streams = {}

    def keep(name):
        return lambda module, inputs: streams.setdefault(name, []).append(inputs[0].flatten(0, 1).double())

    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(keep(f"{index}a"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"{index}b"))
    model.model.norm.register_forward_pre_hook(keep("last"))
    calibration = batches(2)
    with torch.no_grad():
        for batch in calibration:
            model(batch.input_ids)
    pooled = torch.zeros(48, 48, dtype=torch.float64)
    for parts in streams.values():
        rows = torch.cat(parts)
        covariance = rows.mT @ rows
        pooled += covariance / covariance.trace()
    expected = torch.linalg.eigh(pooled)[1][:, -40:]
    sliced, report = slice_model(model, config, calibration, OPTIONS)
    # E V of an untied table: the rows span what the basis does.
    table = model.model.embed_tokens.weight.double()
    projected = sliced.model.embed_tokens.weight.double()
    assert torch.allclose(projected @ projected.mT, table @ expected @ expected.mT @ table.mT, atol=1e-10)
    assert len(report.eigenvalues) == 7
    assert report.eigenvalues[1:] == [None] * 6


@pytest.mark.parametrize(
    ("case", "choices", "message"),
    [
        ("llama-tied", {"slice": 0.2}, "its head is tied to the embedding.*or untie it"),
        ("opt", {"slice": 0.2}, "keeps its 48 columns .a LayerNorm subtracts the mean over all columns."),
        ("opt", {"keep": 0.9, "untie": True}, "keeps its width all the same: a LayerNorm"),
        ("llama", {"keep": 0.9, "untie": True}, "the head of this llama model is not tied"),
        ("llama-tied", {"slice": 0.0, "untie": True}, "would store .* the dense one stores"),
        ("opt", {"keep": 0.2}, "cannot be reached: the model keeps its width"),
        ("llama", {"slice": 0.2, "shortcut": "dense"}, "shortcut: the stock form has none"),
        ("llama", {"widths": [40] * 7}, "widths: the stock form has one width"),
        ("llama", {"keep": 0.9, "kv_groups": [2, 1, 2]}, "kv_groups: the stock form has one number"),
    ],
)
def test_what_cannot_be_is_refused(case, choices, message):
    model = tiny_model(case)
    with pytest.raises(SliceGPTError, match=message):
        plan_recipe(
            Recipe(form="stock", round_to=4, **choices),
            canonical_fields(model),
            torch.float64,
            source=model.config,
        )


@pytest.mark.parametrize("case", ["phi3-long", "helium"])
def test_a_class_that_takes_no_other_width_says_so(case):
    model = tiny_model(case)
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 40, True), Shape(form="stock", round_to=8), 64)
    with pytest.raises(SliceGPTError, match=r"form: (Phi3|Helium)Config has no stock form"):
        check_stock(config, source_of(model))


def test_untie_is_for_the_stock_form():
    with pytest.raises(SliceGPTError, match="untie: is for the stock form"):
        Recipe(keep=0.9, untie=True)


def test_shortcuts_and_layers_of_their_own_are_refused():
    fields = canonical_fields(tiny_model("llama"))
    with pytest.raises(SliceGPTError, match=r"has no shortcuts, got compact and dense ones|got compact ones"):
        check_form(plan(fields, constant_widths(fields, 40)))
    config = plan(fields, constant_widths(fields, 48))
    config.layer_neurons = [80, 64, 48]
    with pytest.raises(SliceGPTError, match="one number of neurons in all layers, got 48 to 80"):
        check_form(config)


@pytest.mark.parametrize("case", ["llama", "llama-tied", "opt", "qwen2", "stablelm"])
def test_the_size_is_met_from_below(case):
    """Whatever the class stores besides, norms and biases, is counted."""
    model = tiny_model(case)
    fields = canonical_fields(model)
    dense = fields["source_parameters"]
    assert (
        stock_parameters(plan(fields, constant_widths(fields, 48), Shape(form="stock")), model.config)
        == dense
    )
    config = plan_recipe(
        Recipe(keep=0.85, form="stock", round_to=4), fields, torch.float64, source=model.config
    )
    assert config.boundary_widths == [48] * (config.num_blocks + 1)  # neurons first
    more = plan(
        fields,
        config.boundary_widths,
        Shape(form="stock", round_to=4),
        config.intermediate_size + 4,
    )
    got = stock_parameters(config, model.config)
    assert got <= 0.85 * dense < stock_parameters(more, model.config)


def test_layers_may_differ_in_the_per_layer_form():
    """No shortcuts, and in each layer as many neurons as its costs call for; the size is still met from below."""
    model = tiny_model("llama-tied")
    fields = canonical_fields(model)
    config = plan_recipe(Recipe(keep=0.85, form="per-layer", round_to=4), fields, torch.float64)
    options = SlicingOptions(dtype=torch.float64, ridge=0.3, neuron_multiple=4)
    sliced, _ = slice_model(model, config, batches(2), options)
    assert set(sliced.config.shortcuts) == {"identity"}
    assert len(set(sliced.config.neurons)) > 1
    assert sum(p.numel() for p in sliced.parameters()) <= 0.85 * fields["source_parameters"]
    with pytest.raises(SliceGPTError, match="one number of neurons in all layers"):
        check_form(sliced.config)
