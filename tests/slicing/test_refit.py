"""Output refit in a run of slicing: its first block against Hugging Face's own activations, every family, errors."""

import json

import pytest
import torch
from support.objectives import Unweighted
from support.ridge_regression import stacked_ridge
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.slicing import Objective, SlicingOptions, slice_model
from slicegpt.slicing.objective import Writer

CASES = [
    "llama",
    "llama-tied",
    "llama-biased",
    "mistral-window",
    "qwen3-tied",
    "opt",
    "opt-untied",
    "phi",
    "granite-tied",
    "gpt-neox",
]


def sliced(model, width, calibration=None, dtype=torch.float64, shape=None, **options):
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, width), shape or Shape())
    calibration = batches() if calibration is None else calibration
    options = SlicingOptions(dtype=dtype, refit=True, **{"fitted": 1.0} | options)
    return slice_model(model, config, calibration, options)


def blocks_and_streams(model, calibration, padding=None):
    """Streams of a Hugging Face Llama before and after every attention and MLP, from hooks: [N, D] each."""
    streams = []

    def before(module, arguments, keywords):
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        streams[-1].append(hidden.flatten(0, 1))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True)
        for layer in model.model.layers
        for module in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    handles.append(model.model.norm.register_forward_pre_hook(before, with_kwargs=True))
    with torch.no_grad():
        for batch in calibration:
            streams.append([])
            model(batch.input_ids)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in zip(*streams, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "objective"), [("llama", Objective()), ("llama-tied", Objective()), ("llama", Unweighted())]
)
def test_first_block_is_fitted_to_the_dense_stream(case, objective):
    """Attention of layer 0: its weights and the spectrum after it, from Hugging Face's own activations.

    At boundary 0 nothing has been fitted yet, so the block's activations are those of the unfitted sliced model.
    """
    model, calibration = tiny_model(case), batches()
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 36), Shape())
    plain, _ = slice_model(model, config, calibration, SlicingOptions(dtype=torch.float64, refit=False))
    options = SlicingOptions(dtype=torch.float64, refit=True, ridge=0.1, fitted=1.0)
    fitted, report = slice_model(model, config, calibration, options, objective=objective)
    activations = []
    plain.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, arguments: activations.append(arguments[0].flatten(0, 1))
    )
    streams = []
    plain.model.layers[0].input_norm.register_forward_pre_hook(
        lambda module, arguments: streams.append(arguments[0].flatten(0, 1))
    )
    for batch in calibration:
        plain(batch.input_ids)
    a, h = torch.cat(activations), torch.cat(streams)
    # The basis of boundary 0, from what the embedding became there (exact: the tokens span the whole width).
    embedded = model.get_input_embeddings()(torch.cat([b.input_ids for b in calibration]).flatten())
    basis = torch.linalg.lstsq(embedded, h).solution
    carried, target = h @ basis.mT, blocks_and_streams(model, calibration)[1]
    dense = model.model.layers[0].self_attn.o_proj.weight.mT
    # Tokens count by the inverse of their norms, or alike; the roots of their weights stand before both sides.
    squares = target.square().sum(dim=1, keepdim=True) + 48 * model.config.rms_norm_eps
    counts = torch.ones_like(squares) if isinstance(objective, Unweighted) else squares**-0.25
    weight, _ = stacked_ridge(counts * a, counts * (target - carried), 0.1, Writer(dense, None))
    out = carried + a @ weight
    spectrum = torch.linalg.svdvals(out).square()
    actual = torch.tensor(report.eigenvalues[1], dtype=torch.float64)
    assert (actual - spectrum).abs().max() < 1e-9 * spectrum[0]  # float64 rounding through two least squares
    # The stored weights are the fitted ones on the next basis: the sliced output is the projection of `out`.
    outputs = []
    fitted.model.layers[0].mlp_norm.register_forward_pre_hook(
        lambda module, arguments: outputs.append(arguments[0].flatten(0, 1))
    )
    for batch in calibration:
        fitted(batch.input_ids)
    leading = torch.linalg.svd(out, full_matrices=False)[2][:36].mT
    assert relative_error(torch.cat(outputs).square().sum(1), (out @ leading).square().sum(1)) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_fitted_network_is_closer_to_the_dense_one(case):
    """On the calibration tokens, logits and all: what the refit is for. Families with biases fit them as well."""
    model, calibration = tiny_model(case), batches(12)
    ids = torch.cat([batch.input_ids for batch in calibration])
    dense = model(ids).logits
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 36), Shape())
    plain, _ = slice_model(model, config, calibration, SlicingOptions(dtype=torch.float64, refit=False))
    fitted, report = sliced(model, 36, calibration)
    assert relative_error(fitted(ids).logits, dense) < relative_error(plain(ids).logits, dense)
    assert fitted.num_parameters() == plain.num_parameters()
    assert [entry["block"] for entry in report.refit] == list(range(config.num_blocks))
    assert all(entry["remaining"] < 1 for entry in report.refit)
    json.dumps(report.refit)  # it goes into slicing.json


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_compact_and_written_out_shortcuts_agree_when_neither_is_fitted(case):
    """At a huge ridge the refit changes nothing, dense shortcuts (which are fitted as well) among them."""
    model, ids = tiny_model(case), token_ids()
    fields = canonical_fields(model)
    for shape in (Shape(), Shape("dense")):
        config = plan(fields, constant_widths(fields, 36), shape)
        plain, _ = slice_model(model, config, batches(), SlicingOptions(dtype=torch.float64, refit=False))
        fitted, _ = sliced(model, 36, shape=shape, ridge=1e12)
        # Biases are fitted without a ridge: compare families without them.
        if not (fields.get("attention_output_bias") or fields.get("mlp_output_bias")):
            assert relative_error(fitted(ids).logits, plain(ids).logits) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_nothing_to_fit_at_full_width(case):
    """Without slicing there is nothing to fit, and the model stays exact."""
    model, ids = tiny_model(case), token_ids()
    whole, report = sliced(model, 48)
    assert relative_error(whole(ids).logits, model(ids).logits) < 1e-10
    assert report.refit == []


@torch.no_grad()
def test_activations_kept_or_computed_twice_are_the_same(monkeypatch):
    model, ids = tiny_model("phi"), token_ids()
    kept, _ = sliced(model, 36)
    monkeypatch.setattr("slicegpt.slicing.propagation.free_memory", lambda device: 0)
    again, _ = sliced(model, 36)
    assert torch.equal(kept(ids).logits, again(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt"])
def test_padding_does_not_count(case):
    """Right-padded samples give the same model as the same samples alone, whatever the padding holds."""
    model = tiny_model(case)
    lengths = [16, 9, 15, 12] * 4
    ids = torch.cat([token_ids(4, 16, seed) for seed in range(4)])
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    padded = [CalibrationBatch(torch.where(mask.bool(), ids, 7), mask)]
    alone = [
        CalibrationBatch(ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
        for row, length in enumerate(lengths)
    ]
    first, first_report = sliced(model, 36, padded, ridge=None)
    second, second_report = sliced(model, 36, alone, ridge=None)
    assert [e["ridge"] for e in first_report.refit] == [e["ridge"] for e in second_report.refit]
    logits = [network(ids, attention_mask=mask).logits[mask.bool()] for network in (first, second)]
    assert relative_error(*logits) < 1e-7


@torch.no_grad()
def test_half_precision():
    """Stored and computed in bfloat16; close to the same fit in float64 (2^-8, a few layers)."""
    ids = token_ids()
    exact = sliced(tiny_model("llama"), 44, ridge=0.1)[0](ids).logits
    rounded, _ = sliced(tiny_model("llama").to(torch.bfloat16), 44, dtype=torch.bfloat16, ridge=0.1)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert relative_error(rounded(ids).logits, exact) < 0.15


def test_non_finite_activations_are_named_by_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        SliceGPTError, match=r"activations: NaN or infinity in the stream after layer 1 \(mlp\)"
    ):
        sliced(model, 36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge: must be above 0, got 0.0"),
        ({"ridge": float("nan")}, "ridge: must be above 0"),
        ({"fitted": 0.0}, r"fitted: must lie in \(0, 1\], got 0.0"),
    ],
)
def test_bad_ridges_are_refused(options, message):
    with pytest.raises(SliceGPTError, match=message):
        SlicingOptions(refit=True, **options)


def test_refit_is_deterministic():
    model = tiny_model("llama")
    states = [sliced(model, 36)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
