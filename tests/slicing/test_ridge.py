"""λ of the refit: chosen by what the sliced model loses on held-out windows; and the share of samples it fits to."""

import copy
from dataclasses import replace

import pytest
import torch
from support.tiny_models import tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.modeling.losses import window_losses
from slicegpt.progress import Progress
from slicegpt.slicing import Objective, SlicingOptions, slice_model
from slicegpt.slicing.sink import MemorySink
from slicegpt.slicing.slicer import Slicer

OPTIONS = SlicingOptions(dtype=torch.float64, ridge=0.1)
CHOSEN = replace(OPTIONS, ridge=None)
HELD_OUT = token_ids(3, 20, seed=99)
CANDIDATES = Objective().ridges


def batches(count: int = 4) -> list[CalibrationBatch]:
    ids = [token_ids(4, 16, seed) for seed in range(count)]
    return [CalibrationBatch(tokens, torch.ones_like(tokens)) for tokens in ids]


def planned(model, width=36, shape=None):
    fields = canonical_fields(model)
    return plan(fields, constant_widths(fields, width), shape or Shape(round_to=4))


def sliced_apart(model, config, ridges=CANDIDATES) -> tuple[MemorySink, SlicedForCausalLM]:
    """The run of slicing itself, without a choice: all fits, and the model that the tokens went on through."""
    checkpoint, options = checkpoint_of(model), replace(OPTIONS, ridge=None)
    sink = MemorySink()
    Slicer(checkpoint, config, batches(), options, Objective(), ridges, Progress(quiet=True), sink).run()
    return sink, sink.candidate(ridges[0]).shell


@torch.no_grad()
@pytest.mark.parametrize("shortcut", ["compact", "dense"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "phi"])
def test_the_candidate_that_loses_least_is_stored(name, shortcut):
    """Each put together and judged on its own, until one is worse; the tokens went on with the first one's weights."""
    model = tiny_model(name)
    config = planned(model, shape=Shape(shortcut, round_to=4))
    stored, report = slice_model(model, config, batches(), CHOSEN, held_out=HELD_OUT)
    sink, carried = sliced_apart(model, config)
    losses = {}
    for ridge in CANDIDATES:
        alone = copy.deepcopy(carried)
        alone.load_state_dict(carried.state_dict() | sink.fits[ridge])
        losses[ridge] = sum(window_losses(alone, HELD_OUT)) / (3 * 19)
        if losses[ridge] > min(losses.values()):
            break
    best = min(losses, key=losses.get)
    assert report.ridge_search == pytest.approx(losses, rel=1e-12)  # one window or all of them at a time
    assert {entry["ridge"] for entry in report.refit} == {best}
    expected = carried.state_dict() | sink.fits[best]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stored.state_dict().items())
    fixed, _ = slice_model(model, config, batches(), OPTIONS)
    assert all(torch.equal(tensor, carried.state_dict()[key]) for key, tensor in fixed.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tied", "opt", "phi"])
def test_what_depends_on_the_ridge(name):
    """The output weights of every block, dense shortcuts among them: nothing else, and all of it differs."""
    model = tiny_model(name)
    sink, carried = sliced_apart(model, planned(model, shape=Shape("dense", round_to=4)))
    first, *others = (sink.fits[ridge] for ridge in CANDIDATES)
    shortcuts = {key for key in carried.state_dict() if "shortcut" in key}
    assert shortcuts
    written = {key for key in carried.state_dict() if "o_proj" in key or "down_proj" in key}
    for fits in (first, *others):
        assert set(fits) == shortcuts | written
    for fits in others:
        # A zero bias stays where a block's parts share one.
        assert all(not torch.equal(first[key], fits[key]) for key in fits if key.endswith("weight"))


@torch.no_grad()
@pytest.mark.parametrize(
    "held_out", [None, HELD_OUT[:0], HELD_OUT[:, :1]], ids=["none", "empty", "one token"]
)
def test_nothing_to_judge_by(held_out):
    """The middle one is taken, and the report says that nothing was evaluated."""
    model = tiny_model("llama")
    stored, report = slice_model(model, planned(model), batches(), CHOSEN, held_out=held_out)
    assert report.ridge_search is None
    assert {entry["ridge"] for entry in report.refit} == {0.3}
    fits = sliced_apart(model, planned(model))[0].fits[0.3]
    assert all(torch.equal(stored.state_dict()[key], tensor) for key, tensor in fits.items())


@torch.no_grad()
def test_without_a_refit_nothing_is_chosen():
    model = tiny_model("llama")
    options = replace(CHOSEN, refit=False)
    _, report = slice_model(model, planned(model), batches(), options, held_out=HELD_OUT)
    assert report.ridge_search is None
    assert report.refit == []


@torch.no_grad()
def test_a_part_of_the_batches_is_fitted_to():
    """The covariances are of all batches, the fit is to the first ones: others after them do not move it."""
    model = tiny_model("llama")
    config, half = planned(model), replace(OPTIONS, fitted=0.5)
    sliced, report = slice_model(model, config, batches(), half)
    assert report.tokens == 4 * 4 * 16
    whole, _ = slice_model(model, config, batches(), OPTIONS)
    first = "model.embed_tokens.weight"  # its basis comes from the covariance of every batch
    assert torch.equal(sliced.state_dict()[first], whole.state_dict()[first])
    writer = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(sliced.state_dict()[writer], whole.state_dict()[writer])
    # The fraction of the error that remains after the first block's fit is that of a run with half of the tokens,
    # as far as the basis before it is the same: at full rank of the embeddings both span everything.
    swapped, _ = slice_model(model, config, batches()[:2] + batches()[:1:-1], half)
    gap = (swapped.state_dict()[writer].abs() - sliced.state_dict()[writer].abs()).abs().max()
    assert gap < 1e-8  # the same sums in another order, and eigenvectors up to their signs
