"""Prices against Hugging Face's own logits, trials against slicing, and the plans that come of both."""

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import tiny_model

from slicegpt.calibration import CalibrationBatch
from slicegpt.conversion.plan import Shape
from slicegpt.conversion.size_plan import choices_for_parameters
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.progress import Progress
from slicegpt.slicing import Objective, SlicingOptions, slice_model
from slicegpt.slicing.allocation import deletion_costs, looked_at
from slicegpt.slicing.divergence import EVERY, DenseLogits
from slicegpt.slicing.plans import find_plan
from slicegpt.slicing.prices import Prices, group_levels, priced_windows
from slicegpt.slicing.trials import trial

SILENT = Progress(quiet=True)
OPTIONS = SlicingOptions(dtype=torch.float64, neuron_multiple=4, allocate="prices")
# Products and sums of a few hundred float64 numbers in another order, over three layers.
SAME = 1e-9


def padded(count: int = 8) -> list[CalibrationBatch]:
    """Batches whose rows are of different lengths."""
    found = batches(count)
    for batch in found:
        batch.attention_mask[1, 11:] = 0
    return found


def divergence(dense: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean KL of the positions that are looked at, from logits, by definition."""
    places = torch.arange(dense.shape[1]) % EVERY == (dense.shape[1] - 1) % EVERY
    logs = [logits[mask.bool() & places].double().log_softmax(dim=-1) for logits in (dense, other)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean().item()


def planned(case: str, keep: float = 0.8):
    fields = canonical_fields(tiny_model(case))
    target = int(keep * fields["source_parameters"])
    return target, choices_for_parameters(fields, target, Shape(round_to=4, neurons=None), "prices")


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "llama-biased", "opt"])
def test_neurons_cost_what_the_whole_model_says(case, monkeypatch):
    """And so do key/value groups: the dense model with the fitted output weights of a block in the place of its own."""
    model, calibration = tiny_model(case), padded()
    part = looked_at(calibration)
    windows = priced_windows(calibration, len(part))
    assert windows.input_ids.shape == (24, 16)  # all rows that are not looked at
    seen = []
    real = Prices.pass_block

    def noted(self, block, dense, fits):
        seen.extend(fits)
        return real(self, block, dense, fits)

    monkeypatch.setattr(Prices, "pass_block", noted)
    _, choices = planned(case)
    costs = deletion_costs(
        checkpoint_of(model), choices[0], part, OPTIONS, Objective(), 0.1, SILENT, None, 20, windows
    )
    groups = choices[0].num_key_value_heads
    levels = group_levels(groups)
    assert levels[-1] == 0
    assert len(seen) == 3 * (2 + len(levels))
    inputs = {"input_ids": windows.input_ids, "attention_mask": windows.attention_mask}
    dense = model(**inputs).logits
    layers = model.model.decoder.layers if case == "opt" else model.model.layers
    for cut, fitted in seen:
        layer = layers[cut.layer]
        mlp, attention = (layer.fc2, layer.self_attn.out_proj) if case == "opt" else (None, None)
        if case != "opt":
            mlp, attention = layer.mlp.down_proj, layer.self_attn.o_proj
        writer = mlp if cut.kind == "neurons" else attention
        kept = int((fitted.weight.abs().sum(dim=1) > 0).sum())
        assert kept == cut.count * (1 if cut.kind == "neurons" else len(fitted.weight) // groups)
        before = writer.weight.clone(), writer.bias
        writer.weight.copy_(fitted.weight.mT)
        if fitted.bias is not None:
            writer.bias = torch.nn.Parameter(fitted.bias)
        expected = divergence(dense, model(**inputs).logits, windows.attention_mask)
        writer.weight.copy_(before[0])
        writer.bias = before[1]
        prices = getattr(costs.prices, cut.kind)[cut.layer]
        assert prices[cut.count] == pytest.approx(expected, rel=SAME, abs=1e-12)
    assert costs.prices.columns == {}
    # What is deleted alone, by the rise of the objective: never falling, and known from all to none.
    for curve in costs.groups:
        assert [count for count, _ in curve] == list(range(groups, -1, -1))
        rises = [rise for _, rise in curve[:-1]]  # without any the part is a constant, which may do better
        assert rises == sorted(rises)


@torch.no_grad()
def test_columns_cost_what_projections_do():
    """The stream projected before every block, without padding, by Hugging Face's modules one after the other."""
    model, calibration = tiny_model("llama"), batches(8)
    part = looked_at(calibration)
    windows = priced_windows(calibration, len(part))
    _, choices = planned("llama")
    costs = deletion_costs(
        checkpoint_of(model), choices[0], part, OPTIONS, Objective(), 0.1, SILENT, None, 20, windows, (36, 44)
    )
    tokens = torch.cat([batch.input_ids for batch in part])
    assert sorted(costs.prices.columns) == [36, 44]

    def steps(ids):
        """Embedding, then the blocks, each as a function of the stream."""
        trunk, places = model.model, torch.arange(ids.shape[1])[None]
        stream = trunk.embed_tokens(ids)
        rotary = trunk.rotary_emb(stream, position_ids=places)
        blocks = []
        for layer in trunk.layers:
            blocks.append(
                lambda x, layer=layer: (
                    x
                    + layer.self_attn(
                        layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None
                    )[0]
                )
            )
            blocks.append(lambda x, layer=layer: x + layer.mlp(layer.post_attention_layernorm(x)))
        return stream, blocks

    for width in (36, 44):
        dense, blocks = steps(tokens)
        stream, own = steps(windows.input_ids)
        for block, of_windows in zip(blocks, own, strict=True):
            rows = dense.flatten(0, 1)
            vectors = torch.linalg.eigh(rows.mT @ rows)[1][:, -width:]
            stream = of_windows(stream @ vectors @ vectors.mT)
            dense = block(dense)
        logits = model.lm_head(model.model.norm(stream))
        expected = divergence(model(windows.input_ids).logits, logits, windows.attention_mask)
        # Eigenvectors turn by the rounding of the covariance over the gap behind them, some 1e-4 of the largest value.
        assert costs.prices.columns[width] == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-tied", "phi", "gemma2"])
def test_a_trial_is_a_slice(case):
    """The divergence of the model that slicing by the same tokens gives."""
    model, calibration = tiny_model(case), padded()
    part = looked_at(calibration)
    windows = priced_windows(calibration, len(part))
    _, choices = planned(case)
    inputs = {"input_ids": windows.input_ids, "attention_mask": windows.attention_mask}
    checkpoint, dense = checkpoint_of(model), model(**inputs).logits
    costs = deletion_costs(checkpoint, choices[0], part, OPTIONS, Objective(), 0.1, SILENT, None, 20, windows)
    for config in choices[:2]:
        layers = [config.intermediate_size] * config.num_hidden_layers
        config = type(config).from_dict(config.to_dict() | {"layer_neurons": layers})
        measured = trial(checkpoint, config, part, windows, costs.dense, OPTIONS, Objective(), 0.1)
        options = SlicingOptions(dtype=torch.float64, ridge=0.1, fitted=len(part) / (len(part) + 1))
        sliced, _ = slice_model(model, config, [*part, windows], options)
        expected = divergence(dense, sliced(**inputs).logits, windows.attention_mask)
        assert measured == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt"])
def test_the_plan_reaches_the_size_and_is_the_best_measured(case):
    """Not worse on the priced windows than a plan of one currency: as many neurons in every layer, or columns alone."""
    model, calibration = tiny_model(case), batches(8)
    target, choices = planned(case)
    checkpoint = checkpoint_of(model)
    plans = find_plan(checkpoint, choices, calibration, OPTIONS, Objective(), 0.1, SILENT)
    # A step of one layer's neurons is left over, and less than one neuron of every layer.
    step = (4 + 3) * 3 * 48
    for plan in plans:
        assert target - step < stored_parameters(plan.config) <= target
        assert all(count % 4 == 0 for count in plan.config.neurons)
    if len(plans) > 1:
        losses = [plan.measured for plan in plans]
        assert losses == sorted(losses)
    part = looked_at(calibration)
    windows = priced_windows(calibration, len(part))
    dense = DenseLogits(
        checkpoint, stream_of(model, windows), None, 1e-5 if case == "opt" else model.config.rms_norm_eps
    )
    fields = canonical_fields(model)

    def measured(config):
        return trial(checkpoint, config, part, windows, dense, OPTIONS, Objective(), 0.1)

    uniform = choices_for_parameters(fields, target, Shape(round_to=4, neurons=None), "uniform")[0]
    columns = choices_for_parameters(fields, target, Shape(round_to=4, neurons=0.0), "prices")[0]
    best = measured(plans[0].config)
    assert best <= measured(uniform)
    assert best <= measured(columns)


def stream_of(model, windows) -> torch.Tensor:
    """The canonical stream after the last block: what the final norm reads."""
    trunk = model.model.decoder if hasattr(model.model, "decoder") else model.model
    norm = trunk.final_layer_norm if hasattr(trunk, "final_layer_norm") else trunk.norm
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(windows.input_ids)
    handle.remove()
    stream = seen[0]
    return stream - stream.mean(dim=-1, keepdim=True) if norm.__class__.__name__ == "LayerNorm" else stream


def test_priced_windows():
    """The rows behind those that are looked at, cut to their share; of what is looked at where there are no others."""
    ids = torch.arange(6 * 1000).view(6, 1000)
    calibration = [CalibrationBatch(part, torch.ones_like(part)) for part in ids.split(2)]
    found = priced_windows(calibration, 1)
    assert torch.equal(found.input_ids, ids[2:6, :192])
    assert torch.equal(priced_windows(calibration, 3).input_ids, ids[:4, :192])
    short = CalibrationBatch(torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64))
    mixed = priced_windows([calibration[0], short], 0)
    assert mixed.input_ids.shape == mixed.attention_mask.shape == (3, 256)
    assert mixed.attention_mask.sum(dim=1).tolist() == [256, 256, 5]
