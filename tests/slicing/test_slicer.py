"""The driver on small models: what is sliced, against an independent computation."""

import pytest
import torch
from support.sliced_models import batches, sliced
from support.tiny_models import VOCAB, relative_error, tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, slice_model

CASES = [
    "llama",
    "llama-tied",
    "mistral-window",
    "qwen3-tied",
    "opt",
    "opt-untied",
    "phi",
    "gemma",
    "gpt-neox",
    "cohere",
]


def as_dense(config):
    """The same configuration with every shortcut written out."""
    copy = type(config).from_dict(config.to_dict())
    copy.shortcuts = ["dense"] * config.num_blocks
    return copy


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_compact_and_dense_shortcuts_are_the_same_network(case, dtype, tolerance):
    """Same subspaces, factor against full matrix. Rounding only: 1e-16 (6e-8) times the depth."""
    model = tiny_model(case, dtype)
    compact, _ = sliced(model, 36, dtype=dtype)
    config = as_dense(compact.config)
    dense, _ = slice_model(model, config, batches(), SlicingOptions(dtype=dtype, refit=False))
    ids = token_ids()
    assert "compact" in compact.config.shortcuts
    assert relative_error(dense(ids).logits, compact(ids).logits) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_orientation_does_not_change_the_network(case):
    """PCA, random and aligned bases of the same subspaces, each calibrated on its own, give the same logits."""
    model, ids = tiny_model(case), token_ids()
    reference = sliced(model, 36)[0](ids).logits
    for orientation in ("pca", "random"):
        other, _ = sliced(model, 36, shortcut="dense", orientation=orientation)
        # The subspaces come from covariances that differ by rounding, amplified by eigenvalue gaps of about 1e-3.
        assert relative_error(other(ids).logits, reference) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slice_head", [False, True])
def test_factor_ranks_and_parameter_count(case, slice_head):
    model, _ = sliced(tiny_model(case), 36, slice_head=slice_head)
    config = model.config
    factors = {name: p for name, p in model.named_parameters() if name.endswith(".factor")}
    assert len(factors) == config.shortcuts.count("compact") > 0
    for factor in factors.values():
        assert factor.shape[0] <= config.dense_hidden_size - 36
        assert factor.shape[1] == 36
    assert model(token_ids()).logits.shape == (3, 12, VOCAB)


def test_tied_models_stay_tied():
    model = tiny_model("llama-tied")
    small, _ = sliced(model, 36)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_first_boundary_is_the_pca_of_the_embeddings(case):
    """Eigenvalues against singular values of the embedded tokens, and the best rank-d approximation."""
    model, calibration = tiny_model(case), batches()
    _, report = sliced(model, 36, calibration)
    ids = torch.cat([batch.input_ids for batch in calibration])
    hidden = model.get_input_embeddings()(ids)
    if case == "opt":
        hidden = hidden + model.model.decoder.embed_positions(torch.ones_like(ids))
    if case in ("opt", "phi"):
        hidden = hidden - hidden.mean(-1, keepdim=True)
    singular = torch.linalg.svdvals(hidden.flatten(0, 1))
    expected = singular.square()
    actual = torch.tensor(report.eigenvalues[0], dtype=torch.float64)
    # Eigenvalues are exact to 1e-16 of the largest.
    assert (actual - expected).abs().max() < 1e-12 * expected.max()


@torch.no_grad()
def test_covariance_sees_the_errors_of_earlier_blocks():
    """Boundary 2's spectrum is that of the stream of the network sliced up to there, run independently."""
    model, calibration = tiny_model("llama"), batches(1)
    small, report = sliced(model, 36, calibration)
    ids = calibration[0].input_ids
    layer = small.model.layers[0]
    hidden = small.model.embed(small.model.embed_tokens(ids), None)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    masks, rotary = small.model.block_inputs(hidden, positions, None)
    mask = masks["full_attention"]
    hidden = layer.attention_block(hidden, attention_mask=mask, position_embeddings=rotary[0])
    # The 36 leading eigenvalues at boundary 1 are the energies of the stream's coordinates there, however turned.
    energy = torch.linalg.svdvals(hidden.flatten(0, 1)).square()
    expected = torch.tensor(report.eigenvalues[1][:36], dtype=torch.float64)
    assert (energy - expected).abs().max() < 1e-10 * expected.max()


def test_padding_does_not_count():
    """Right-padded samples give the same model as the same samples alone, whatever the padding holds."""
    model = tiny_model("opt")
    lengths = [16, 9, 5, 12]
    ids = token_ids(4, 16)
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    padded = [CalibrationBatch(torch.where(mask.bool(), ids, 7), mask)]
    alone = [
        CalibrationBatch(ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
        for row, length in enumerate(lengths)
    ]
    first, first_report = sliced(model, 36, padded)
    second, second_report = sliced(model, 36, alone)
    assert first_report.tokens == second_report.tokens == sum(lengths)
    # 42 tokens span less than D: only the leading eigenvalues are comparable, the model where they are kept.
    for one, other in zip(first_report.eigenvalues, second_report.eigenvalues, strict=True):
        if one is not None:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-9 * one[0]
    with torch.no_grad():
        # Judged on the calibration tokens, whose span both subspaces hold almost whole.
        logits = [network(ids, attention_mask=mask).logits[mask.bool()] for network in (first, second)]
    assert relative_error(*logits) < 1e-6


def test_slicing_is_deterministic():
    model = tiny_model("llama")
    states = [sliced(model, 36)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_batching_does_not_matter():
    model = tiny_model("llama")
    whole = batches(1, 8)
    split = [CalibrationBatch(ids[None], torch.ones_like(ids[None])) for ids in whole[0].input_ids]
    ids = token_ids()
    with torch.no_grad():
        one, other = (sliced(model, 36, calibration)[0](ids).logits for calibration in (whole, split))
    assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize("case", ["llama", "opt-untied", "phi"])
def test_tables_are_folded_in_pieces(case, monkeypatch):
    """Vocabulary-sized tables pass through float64 some rows at a time; how many does not show."""
    model = tiny_model(case)
    whole = sliced(model, 36)[0].state_dict()
    monkeypatch.setattr("slicegpt.conversion.folding.TABLE_ROWS", 7)
    pieces = sliced(model, 36)[0].state_dict()
    for name in ("lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"):
        if name in whole:
            assert relative_error(pieces[name], whole[name]) < 1e-12


@torch.no_grad()
def test_normalized_signal():
    """The covariance of the normalised stream, against its definition at boundary 0."""
    model, calibration = tiny_model("llama"), batches()
    _, report = sliced(model, 36, calibration, signal="normalized")
    hidden = model.get_input_embeddings()(torch.cat([batch.input_ids for batch in calibration])).flatten(0, 1)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
    expected = torch.linalg.svdvals(normed).square()
    actual = torch.tensor(report.eigenvalues[0], dtype=torch.float64)
    assert (actual - expected).abs().max() < 1e-12 * expected.max()


@torch.no_grad()
def test_varying_widths_keep_more_where_wider():
    """A wide model approximates the dense one better than a narrow one; mixed widths run and lie between."""
    model, ids = tiny_model("llama"), token_ids()
    dense = model(ids).logits
    errors = [
        relative_error(sliced(model, widths)[0](ids).logits, dense)
        for widths in (24, [24, 44, 24, 44, 44, 36, 48], 44, 48)
    ]
    assert errors[0] > errors[2] > errors[3]
    assert errors[1] > errors[2]
    assert errors[3] < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
@torch.no_grad()
def test_half_precision(case, dtype):
    """Stored and computed in 16 bits; close to the same model sliced in float64 (2^-8 for bfloat16, a few layers)."""
    model, ids = tiny_model(case), token_ids()
    exact = sliced(model, 44)[0](ids).logits
    rounded, _ = sliced(tiny_model(case).to(dtype), 44, dtype=dtype)
    assert {parameter.dtype for parameter in rounded.parameters()} == {dtype}
    tolerance = 0.15 if dtype == torch.bfloat16 else 0.02
    assert relative_error(rounded(ids).logits, exact) < tolerance


def test_non_finite_activations_are_named_by_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        SliceGPTError, match=r"activations: NaN or infinity in the stream after layer 1 \(mlp\)"
    ):
        sliced(model, 36)


def test_missing_calibration():
    with pytest.raises(SliceGPTError, match="boundary 0 needs calibration tokens, got none"):
        sliced(tiny_model("llama"), 36, calibration=[])


def test_opt_350m_is_refused_with_the_reason():
    with pytest.raises(SliceGPTError, match=r"OPT-350m.*norms come after the residual"):
        canonical_fields(tiny_model("opt", do_layer_norm_before=False))


def test_unsupported_architecture_lists_the_supported_ones():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=16, n_head=2, vocab_size=32))
    with pytest.raises(
        SliceGPTError, match=r"model_type 'bloom' is not supported: .*ALiBi; supported are llama, .*opt, phi,"
    ):
        canonical_fields(model)
    small, _ = sliced(tiny_model("llama"), 36)
    with pytest.raises(SliceGPTError, match="an already sliced model"):
        canonical_fields(small)
