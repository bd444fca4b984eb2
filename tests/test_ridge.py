"""λ chosen by the loss on held-out windows: what is judged, and by what."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.evaluate import window_losses
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.progress import Progress
from slicegpt.schedule import Shape, constant_widths, plan
from slicegpt.slicing import SlicingOptions, ridge, slice_model
from slicegpt.slicing.slicer import Slicer

OPTIONS = SlicingOptions(dtype=torch.float64, ridge=0.1)
FAMILIES = ["llama", "llama-tied", "mistral-window", "qwen3-tied", "opt", "phi"]


def batches(count: int = 4) -> list[CalibrationBatch]:
    ids = [token_ids(4, 16, seed) for seed in range(count)]
    return [CalibrationBatch(tokens, torch.ones_like(tokens)) for tokens in ids]


def planned(model, width=36, shape=None):
    fields = canonical_fields(model)
    return plan(fields, constant_widths(fields, width), shape or Shape(round_to=4))


HELD_OUT = token_ids(3, 20, seed=99)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_dense_models_own_stream_has_its_loss(name):
    """Unsliced windows enter the tail as they leave the layer before it: the loss is the dense model's, whatever the
    family calls its layers. Streams of LayerNorm families come in centred, as slicing carries them."""
    model = tiny_model(name)
    centred = checkpoint_of(model).family.mean_subtraction
    layer = checkpoint_of(model).family.layers.format(1)
    streams = []

    def keep(module, args, kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        streams.append(stream - stream.mean(dim=-1, keepdim=True) if centred else stream.clone())

    hook = model.get_submodule(layer).register_forward_pre_hook(keep, with_kwargs=True)
    for row in HELD_OUT.split(1):
        model(row)
    hook.remove()
    expected = sum(window_losses(model, HELD_OUT)) / (3 * 19)
    # Rounding of a float64 network of three layers, norms in float32 included (transformers computes them so).
    assert ridge._tail_loss(model, layer, streams, HELD_OUT) == pytest.approx(expected, rel=1e-5)
    broken = [stream.flip(1) for stream in streams]
    assert ridge._tail_loss(model, layer, broken, HELD_OUT) != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_watched_windows_change_nothing():
    model = tiny_model("llama")
    config, watched = planned(model), [CalibrationBatch(HELD_OUT, torch.ones_like(HELD_OUT))]
    plain, seen = (
        Slicer(checkpoint_of(model), config, batches(), OPTIONS, Progress(quiet=True), windows)
        for windows in ((), watched)
    )
    states = [slicer.run().state_dict() for slicer in (plain, seen)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert plain.report.tokens == seen.report.tokens == 4 * 4 * 16
    assert [stream.shape for stream in seen.passes.watched()] == [(3, 20, 48)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_the_walk_ends_between_worse_neighbours(name):
    """The candidate that is taken is no worse than those beside it, judged one by one."""
    model, given = tiny_model(name), SlicingOptions(dtype=torch.float64)
    config = planned(model)
    _, report = slice_model(model, config, batches(), given, held_out=HELD_OUT)
    losses = report.ridge_search
    assert list(losses) == sorted(losses)
    assert set(losses) <= set(ridge.CANDIDATES)
    best = min(losses, key=losses.get)
    assert {entry["ridge"] for entry in report.refit} == {best}
    place = ridge.CANDIDATES.index(best)
    for index in range(max(0, place - 1), min(place + 2, len(ridge.CANDIDATES))):
        candidate = ridge.CANDIDATES[index]
        # One of the two batches that are fitted to, so a ridge that is twice as large; one of the three layers.
        options = SlicingOptions(dtype=torch.float64, ridge=2 * candidate, fitted=1.0)
        loss = ridge._loss(model, config, batches()[:1], options, HELD_OUT, 1)
        assert losses[candidate] == loss >= losses[best]


@torch.no_grad()
def test_nothing_to_judge_by():
    """Without held-out windows, or with a given ridge, there is no search; the result says so."""
    model = tiny_model("llama")
    config = planned(model)
    cases = [(SlicingOptions(dtype=torch.float64), None), (SlicingOptions(dtype=torch.float64), HELD_OUT[:0])]
    for options, held_out in [*cases, (OPTIONS, HELD_OUT)]:
        _, report = slice_model(model, config, batches(), options, held_out=held_out)
        assert report.ridge_search is None
        assert {entry["ridge"] for entry in report.refit} == {0.1}


@torch.no_grad()
def test_a_part_of_the_batches_is_fitted_to():
    """The covariances are of all batches, the fit of the first ones: more tokens behind it do not move its moments."""
    model = tiny_model("llama")
    config = planned(model)
    half = SlicingOptions(dtype=torch.float64, ridge=0.1, fitted=0.5)
    slicer = Slicer(checkpoint_of(model), config, batches(), half, Progress(quiet=True))
    assert (slicer.passes.fitted, slicer.passes.counted) == (2, 4)
    sliced, report = slicer.run(), slicer.report
    assert report.tokens == 4 * 4 * 16
    whole, _ = slice_model(model, config, batches(), replace(half, fitted=1.0))
    first = "model.embed_tokens.weight"  # its basis comes from the covariance of every batch
    assert torch.equal(sliced.state_dict()[first], whole.state_dict()[first])
    writer = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(sliced.state_dict()[writer], whole.state_dict()[writer])
