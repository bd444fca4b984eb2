"""Families that normalise what their blocks write: neurons are deleted, columns of the stream are not."""

import pytest
import torch
from support.sliced_models import batches, without_neurons
from support.tiny_models import NORMS_BEHIND, relative_error, tiny_model, token_ids

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.size_plan import plan_for_parameters, plan_recipe
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.recipe import Recipe
from slicegpt.runtime import to_canonical


@torch.no_grad()
@pytest.mark.parametrize("case", sorted(NORMS_BEHIND))
def test_a_model_without_some_neurons_is_saved_and_loaded(case, tmp_path):
    small = without_neurons(tiny_model(case, torch.float32), torch.float32)
    small.save_pretrained(tmp_path)
    loaded = SlicedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(token_ids()).logits, small(token_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("case", ["gemma2", "gemma3", "olmo2"])
def test_the_refit_is_a_ridge_regression_before_the_norm(case):
    """Of the first MLP, before which nothing has changed: `a W' diag(g)` to `r t`, weighted by `w / r²`.

    Written out in float64, in the stream's own terms; both sides solve systems of condition 1e3 to 1e-13.
    """
    model = tiny_model(case)
    dense, small = to_canonical(model), without_neurons(model, allocate="uniform")
    layer, ids = dense.model.layers[0], torch.cat([batch.input_ids for batch in batches()])
    seen = {}
    layer.mlp.down_proj.register_forward_hook(lambda _, inputs, out: seen.update(a=inputs[0], y=out))
    layer.register_forward_hook(lambda _, inputs, out: seen.update(after=out))
    layer.self_attn.register_forward_hook(lambda _, inputs, out: seen.update(attended=out[0]))
    layer.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0]))
    dense(ids)
    a, y, after = (seen[name].flatten(0, 1) for name in ("a", "y", "after"))
    between = (seen["before"] + layer.attention_output_norm(seen["attended"])).flatten(0, 1)
    config, target = dense.config, after - between
    assert relative_error(layer.mlp_output_norm(y), target) < 1e-12
    square = torch.maximum(between.square().sum(1), after.square().sum(1))
    size = (y.square().mean(dim=1) + config.inner_norm_eps).sqrt()
    weight = (square + 48 * config.rms_norm_eps).rsqrt() / size.square()

    scale = layer.mlp_output_norm.weight
    scaled, target = layer.mlp.down_proj.weight.mT * scale, target * size[:, None]
    gram = a.mT @ (weight[:, None] * a)
    penalty = 0.1 * gram.diagonal().mean()
    kept = torch.cat(
        [
            (dense.model.layers[0].mlp.up_proj.weight == row).all(dim=1).nonzero()[:, 0]
            for row in small.model.layers[0].mlp.up_proj.weight
        ]
    )
    assert len(kept) == 56
    system = gram[kept][:, kept] + penalty * torch.eye(56, dtype=torch.float64)
    right = a[:, kept].mT @ (weight[:, None] * target) + penalty * scaled[kept]
    expected = torch.linalg.solve(system, right) / scale
    assert relative_error(small.model.layers[0].mlp.down_proj.weight.mT, expected) < 1e-8


@torch.no_grad()
def test_neurons_that_the_refit_chooses_cost_less_than_the_last_ones():
    model, ids = tiny_model("gemma3"), token_ids(seed=9)
    expected = model(ids).logits
    chosen = relative_error(without_neurons(model)(ids).logits, expected)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 56:] = 0
    assert 1e-3 < chosen < 0.7 * relative_error(model(ids).logits, expected)


@pytest.mark.parametrize("case", ["gemma3", "olmo2"])
def test_columns_are_refused_with_what_works(case):
    fields = canonical_fields(tiny_model(case))
    kind = fields["source_model_type"]
    with pytest.raises(
        SliceGPTError, match=f"slice: {kind} normalises what its blocks write.*--neurons 0.25"
    ):
        plan_recipe(Recipe(slice=0.25), fields, torch.float32)
    with pytest.raises(SliceGPTError, match=f"widths: {kind} normalises what its blocks write"):
        plan_recipe(Recipe(widths=[40] * 7), fields, torch.float32)
    with pytest.raises(
        SliceGPTError, match=r"orientation: .* in the model's own basis: it must be 'aligned'"
    ):
        plan(fields, constant_widths(fields, 48), Shape("dense", "random"))


def test_a_true_size_is_reached_by_neurons_alone():
    fields = canonical_fields(tiny_model("gemma3"))
    for keep in (1.0, 0.9, 0.7):
        config = plan_recipe(Recipe(keep=keep), fields, torch.float32)
        assert set(config.boundary_widths) == {48}
        # The sizes differ by 8 neurons of three layers, each of three rows of 48.
        left = keep * fields["source_parameters"] - stored_parameters(config)
        assert 0 <= left < 8 * 3 * 3 * 48
    with pytest.raises(
        SliceGPTError, match="target: 100 elements cannot be reached; with 8 neurons in an MLP"
    ):
        plan_for_parameters(fields, 100, Shape(neurons=None))
    with pytest.raises(SliceGPTError, match="give no neurons, and as many go as it takes"):
        plan_for_parameters(fields, int(0.7 * fields["source_parameters"]), Shape(neurons=0.1))


def test_capped_scores_are_refused_where_attention_has_none():
    """transformers passes over the cap in silence there."""
    small = to_canonical(tiny_model("gemma2"))
    assert small.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        SlicedForCausalLM._from_config(small.config, attn_implementation="sdpa")
