"""Output refit: the ridge regression against a stacked least-squares problem, its choice of λ, and the driver."""

import json

import pytest
import torch
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, refit, slice_model
from slicegpt.slicing.refit import JoinedBatches, Moments, Writer, fit

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


def problem(
    tokens: int, inputs: int = 12, outputs: int = 7, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a mean and correlated columns, and targets that are partly linear in them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(99)).double()
    truth = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(98)).double()
    activations = torch.randn(tokens, inputs, generator=generator).double() @ mixing + 0.5
    noise = torch.randn(tokens, outputs, generator=generator).double()
    return activations, activations @ truth + 2 * noise + 3


def moments_of(activations: torch.Tensor, target: torch.Tensor, keep=None) -> Moments:
    moments = Moments([activations.shape[1]], target.shape[1], torch.device("cpu"))
    for rows in torch.arange(len(activations)).split(17):
        rows = rows if keep is None else rows[keep[rows]]
        moments.add(activations[rows], target[rows])
    return moments


def prior_of(inputs: int = 12, outputs: int = 7, bias: bool = False) -> Writer:
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(97)).double()
    return Writer(weight, torch.zeros(outputs).double() if bias else None)


def stacked_ridge(activations, target, ridge, prior: Writer) -> tuple[torch.Tensor, torch.Tensor]:
    """The same regression as one least-squares problem, by SVD: rows √(λ g²) I below the activations."""
    inputs = activations.shape[1]
    centred = activations - activations.mean(dim=0) if prior.bias is not None else activations
    penalty = (ridge * centred.square().sum(dim=0).mean()).sqrt() * torch.eye(inputs).double()
    left, right = torch.cat((activations, penalty)), torch.cat((target, penalty @ prior.weight))
    if prior.bias is not None:
        ones = torch.cat((torch.ones(len(activations)), torch.zeros(inputs))).double()
        left = torch.cat((left, ones[:, None]), dim=1)
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution[:inputs], solution[inputs:].sum(dim=0)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_fit_is_the_stacked_least_squares_solution(ridge, intercept):
    activations, target = problem(200)
    keep, prior = torch.arange(200) % 5 != 2, prior_of(bias=intercept)
    fitted = fit(moments_of(activations, target, keep), ridge, prior)
    weight, bias = stacked_ridge(activations[keep], target[keep], ridge, prior)
    # Normal equations lose the square of the condition number, about 1e4 here, times 2^-53.
    assert relative_error(fitted.weight, weight) < 1e-11
    if intercept:
        assert relative_error(fitted.bias, bias) < 1e-11
    else:
        assert fitted.bias is None


def test_joined_batches_lose_no_token(monkeypatch):
    monkeypatch.setattr(refit, "TOKENS_PER_CALL", 50)
    activations, target = problem(200)
    weight = 1 + torch.arange(200).double() % 3
    at_once, joined = (Moments([12], 7, torch.device("cpu")) for _ in range(2))
    at_once.add(activations, target, weight)
    calls, add = [], joined.add
    monkeypatch.setattr(joined, "add", lambda *parts: calls.append(len(parts[0])) or add(*parts))
    batches = JoinedBatches(joined)
    for rows in torch.arange(200).split(17):
        batches.add(activations[rows], target[rows], weight[rows])
    assert batches.finish() is joined
    assert calls == [51, 51, 51, 47]  # three batches of 17 make 50; the rest is what `finish` adds
    batches.finish()
    assert sum(calls) == 200
    for name in ("gram", "cross", "energy", "inputs", "outputs", "tokens"):
        # Two orders of 200 float64 additions.
        assert relative_error(getattr(joined, name), getattr(at_once, name)) < 400 * 2.0**-53


@pytest.mark.parametrize("intercept", [False, True])
def test_a_token_of_weight_three_is_three_tokens(intercept):
    activations, target = problem(80)
    counts = torch.arange(80) % 4
    weighted = Moments([12], 7, torch.device("cpu"))
    for rows in torch.arange(80).split(17):
        weighted.add(activations[rows], target[rows], counts[rows].double())
    repeated = moments_of(activations.repeat_interleave(counts, 0), target.repeat_interleave(counts, 0))
    for name in ("gram", "cross", "energy", "inputs", "outputs", "tokens"):
        assert relative_error(getattr(weighted, name), getattr(repeated, name)) < 1e-13
    prior = prior_of(bias=intercept)
    fits = [fit(moments, 0.1, prior) for moments in (weighted, repeated)]
    assert relative_error(fits[0].weight, fits[1].weight) < 1e-11
    assert fits[0].loss(weighted) == pytest.approx(fits[1].loss(repeated), rel=1e-10)


@pytest.mark.parametrize("halves", [False, True])
def test_float32_moments(halves, monkeypatch):
    """Against float64, as float32 products and as those of bfloat16; the fit is the same but for what is averaged."""
    monkeypatch.setattr(refit, "has_fast_bfloat16", lambda device: halves)
    activations, target = problem(4000)
    weight = torch.rand(4000, generator=torch.Generator().manual_seed(3)).double() + 0.1
    exact, moments = (Moments([12], 7, torch.device("cpu")) for _ in range(2))
    exact.add(activations, target, weight)
    moments.add(activations.float(), target.float(), weight.float())
    for name, right in (("gram", activations), ("cross", target)):
        magnitudes = activations.abs().mT @ (weight[:, None] * right.abs())
        # Each operand is rounded to 8 bits (2^-9 of it at most), or both and the weight to 24; then 4000 float32 sums.
        bound = (2 * 2.0**-9 + 2.0**-18 if halves else 4 * 2.0**-24) + 4097 * 2.0**-24
        assert ((getattr(moments, name) - getattr(exact, name)).abs() <= bound * magnitudes).all()
    fits = [fit(sums, 0.1, prior_of(bias=True)) for sums in (exact, moments)]
    # Independent roundings of 4000 tokens: some 2^-9 / sqrt(4000) of a weight; ten times that.
    limit = 10 * 2.0**-9 / 4000**0.5 if halves else 1e-5
    assert relative_error(fits[1].weight, fits[0].weight) < limit


@pytest.mark.parametrize("kept", [None, [0, 2, 3, 7, 11]])
@pytest.mark.parametrize("intercept", [False, True])
def test_loss_is_that_of_the_tokens(intercept, kept):
    """The quadratic form in the moments of other tokens, against their residuals themselves; and what the fit leaves
    of its own."""
    own, kept = moments_of(*problem(200)), None if kept is None else torch.tensor(kept)
    fitted = fit(own, 0.1, prior_of(bias=intercept), kept)
    assert fitted.left == pytest.approx(fitted.loss(own), rel=1e-10)
    activations, target = problem(90, seed=1)
    left = target - activations @ fitted.weight
    if intercept:
        left = left - fitted.bias
    assert fitted.loss(moments_of(activations, target)) == pytest.approx(
        left.square().sum().item(), rel=1e-10
    )


def test_moments_add_up():
    activations, target = problem(120)
    total = moments_of(activations[:50], target[:50])
    total += moments_of(activations[50:], target[50:])
    whole = moments_of(activations, target)
    for name in ("gram", "cross", "energy", "inputs", "outputs", "tokens"):
        assert relative_error(getattr(total, name), getattr(whole, name)) < 1e-13


def test_a_system_that_is_not_positive_definite_is_solved_in_its_range():
    """Cholesky fails on a singular matrix; the eigenvalues' pseudoinverse still solves a consistent system."""
    basis = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    system = basis @ torch.diag(torch.tensor([5.0, 3, 2, 1]).double()) @ basis.T - 1e-20 * torch.eye(9)
    right = system @ torch.ones(9, 2).double()
    assert relative_error(system @ refit.solve(system, right), right) < 1e-12


# --- the driver -------------------------------------------------------------------------------------------------


def batches(count: int = 6, batch: int = 4, length: int = 16) -> list[CalibrationBatch]:
    ids = [token_ids(batch, length, seed) for seed in range(count)]
    return [CalibrationBatch(tokens, torch.ones_like(tokens)) for tokens in ids]


def sliced(model, width, calibration=None, dtype=torch.float64, shape=None, **options):
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, width), shape or Shape())
    calibration = batches() if calibration is None else calibration
    options = SlicingOptions(dtype=dtype, refit=True, **{"fitted": 1.0} | options)
    return slice_model(model, config, calibration, options)


def blocks_and_streams(model, calibration, padding=None):
    """Streams of a Hugging Face Llama before and behind every attention and MLP, from hooks: [N, D] each."""
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
@pytest.mark.parametrize("case", ["llama", "llama-tied"])
def test_first_block_is_fitted_to_the_dense_stream(case):
    """Attention of layer 0: its weights and the spectrum behind it, from Hugging Face's own activations.

    At boundary 0 nothing has been fitted yet, so the block's activations are those of the unfitted sliced model.
    """
    model, calibration = tiny_model(case), batches()
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 36), Shape())
    plain, _ = slice_model(model, config, calibration, SlicingOptions(dtype=torch.float64, refit=False))
    fitted, report = slice_model(
        model, config, calibration, SlicingOptions(dtype=torch.float64, refit=True, ridge=0.1, fitted=1.0)
    )
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
    # Tokens count by the inverse of their norms.
    counts = (target.square().sum(dim=1, keepdim=True) + 48 * model.config.rms_norm_eps) ** -0.25
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
    assert all(entry["left"] < 1 for entry in report.refit)
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
        ({"ridge": 0.0}, "--ridge: must be above 0, got 0.0"),
        ({"ridge": float("nan")}, "--ridge: must be above 0"),
        ({"fitted": 0.0}, r"--refit-share: must lie in \(0, 1\], got 0.0"),
    ],
)
def test_bad_ridges_are_refused(options, message):
    with pytest.raises(SliceGPTError, match=message):
        SlicingOptions(refit=True, **options)


def test_refit_is_deterministic():
    model = tiny_model("llama")
    states = [sliced(model, 36)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
