"""Slicing a trained model, SmolLM2-135M: exactness at depth, quality, and the sizes that are promised."""

import pytest
import torch
from support.tiny_models import relative_error

from slicegpt.calibration import load_documents, sample_batches
from slicegpt.conversion.canonical import build_model
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.size_plan import plan_for_parameters
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import decoder_parameters, stored_parameters
from slicegpt.slicing import SlicingOptions, slice_model

pytestmark = [pytest.mark.model, pytest.mark.slow]

WIDTH = 504


@pytest.fixture(scope="module")
def fields(smollm2):
    return canonical_fields(smollm2[0])


@pytest.fixture(scope="module")
def ids(smollm2, documents):
    return smollm2[1](documents[0], return_tensors="pt").input_ids[:, :256]


@pytest.fixture(scope="module")
def sliced(smollm2, fields):
    """Width 504 with compact shortcuts, calibrated on a little of Python's reference."""
    model, tokenizer = smollm2
    batches = sample_batches(load_documents("python-reference", "train"), tokenizer, 8, 256)
    config = plan(fields, constant_widths(fields, WIDTH), Shape(round_to=8))
    return slice_model(model, config, batches, SlicingOptions())


def with_dense_shortcuts(model):
    """The same model with every factor written out as the matrix it stands for."""
    config = type(model.config).from_dict(model.config.to_dict())
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".factor")}
    for name, factor in model.state_dict().items():
        if name.endswith(".factor"):
            matrix = torch.eye(factor.shape[1], dtype=torch.float64) - factor.double().mT @ factor.double()
            state[name.replace(".factor", ".weight")] = matrix.mT.to(factor.dtype).contiguous()
    config.shortcuts = ["dense"] * config.num_blocks
    return build_model(config, state)


@torch.no_grad()
def test_random_rotations_leave_the_logits_unchanged(smollm2, fields, ids):
    model, _ = smollm2
    config = plan(fields, constant_widths(fields, 576), Shape("dense", "random"))
    turned, _ = slice_model(model, config, (), SlicingOptions(orientation="random"))
    # 60 rotated blocks in float32 (6e-8 a rounding); the contract is 1e-4.
    assert relative_error(turned(ids).logits, model(ids).logits) < 1e-4


@torch.no_grad()
def test_compact_shortcuts_equal_dense_ones(sliced, ids):
    model, _ = sliced
    assert model.config.shortcuts == ["compact"] * 59 + ["dense"]
    assert {rank for rank in map(model.config.shortcut_rank, range(59))} == {576 - WIDTH}
    assert relative_error(with_dense_shortcuts(model)(ids).logits, model(ids).logits) < 1e-4


def test_quality(sliced, smollm2, documents):
    """Little is lost at 12.5 % slicing; ten times as much would still be a broken method."""
    model, tokenizer = smollm2
    dense, small = (
        perplexity(each, tokenizer, documents, 256, 4, 8).perplexity for each in (model, sliced[0])
    )
    assert dense < small < 2 * dense


def test_spectra_decrease(sliced):
    _, report = sliced
    spectra = [values for values in report.eigenvalues if values is not None]
    assert len(spectra) == 60
    for values in spectra:
        assert values == sorted(values, reverse=True)
        assert values[-1] > -1e-9 * values[0]


def test_sizes(fields):
    """What the design promises: equal weights at width 504 compact and 456 dense; no growth; a size that is met."""
    compact = plan(fields, constant_widths(fields, 504), Shape(round_to=8))
    dense = plan(fields, constant_widths(fields, 456), Shape("dense", round_to=8))
    # Within 2 % of each other, both about 96 to 97 million.
    assert abs(decoder_parameters(compact) / decoder_parameters(dense) - 1) < 0.02
    assert stored_parameters(compact) < fields["source_parameters"]
    config = plan_for_parameters(fields, int(0.85 * fields["source_parameters"]), Shape(round_to=8))
    wider = plan(fields, constant_widths(fields, config.boundary_widths[0] + 8), Shape(round_to=8))
    target = 0.85 * fields["source_parameters"]
    assert stored_parameters(config) <= target < stored_parameters(wider)


def test_generation_is_text(sliced, smollm2):
    model, tokenizer = sliced[0], smollm2[1]
    prompt = tokenizer("The for statement is used to", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(**prompt, **settings)
    without = model.generate(**prompt, use_cache=False, **settings)
    assert torch.equal(with_cache, without)
    assert tokenizer.decode(with_cache[0]).isprintable() or "\n" in tokenizer.decode(with_cache[0])
