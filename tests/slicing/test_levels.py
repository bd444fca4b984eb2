"""A block at several counts from one factorisation, against fits that are made anew."""

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model

from slicegpt.conversion.plan import constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.slicing import Objective
from slicegpt.slicing.blocks import blocks_of, dense_block, dense_writers, group_rows, remaining_writers
from slicegpt.slicing.levels import levels
from slicegpt.slicing.options import SlicingOptions
from slicegpt.slicing.propagation import Propagation
from slicegpt.slicing.refit import KeptHeads, fit_block
from slicegpt.slicing.regression import prior_of

CPU, RIDGE = torch.device("cpu"), 0.1


@torch.no_grad()
def collected(case: str, index: int):
    """Config, block, output weights and moments of a dense tiny model's block."""
    model = tiny_model(case)
    fields = canonical_fields(model)
    config, checkpoint = plan(fields, constant_widths(fields, 48)), checkpoint_of(model)
    options = SlicingOptions(dtype=torch.float64, device=CPU, activation_storage="device")
    propagation = Propagation(config, batches(), options)
    propagation.start(checkpoint, None)
    for block in blocks_of(config)[: index + 1]:
        layer = checkpoint.layer(block.layer)
        writers = dense_writers(config, block, layer, CPU)
        lifted = dense_block(config, block, layer, writers, torch.float64, CPU)
        moments = propagation.new_moments(lifted, propagation.streams)
        propagation.collect_dense(block, lifted, Objective(), moments)
    return config, block, writers, moments


def value(moments, prior, writer) -> float:
    """The refit's objective, penalty included."""
    penalty = Objective().penalty(moments, RIDGE, prior.bias is not None)
    drawn = (penalty[:, None] * (writer.weight - prior.weight.double()).square()).sum().item()
    return Objective().loss(moments, writer) + drawn


@pytest.mark.parametrize(
    ("case", "index", "part", "counts"),
    [
        ("llama", 2, "attention", [2, 1, 0]),
        ("llama-biased", 3, "mlp", [60, 20, 0]),
        ("opt", 2, "attention", [3, 0]),
        ("phi", 1, "attention", [1, 0]),
        ("phi", 1, "mlp", [80, 40]),
    ],
)
def test_levels(case, index, part, counts):
    """The groups are those that `fit_block` keeps and the fits its fits; the rises are those of the objective."""
    config, block, writers, moments = collected(case, index)
    prior, attention = prior_of(writers.values()), part == "attention"
    whole = config.num_key_value_heads if attention else 80
    found = list(
        levels(config, Objective(), moments, writers, RIDGE, part, [whole, *counts[counts[0] == whole :]])
    )
    base = value(moments, prior, found[0].writer)
    assert found[0].rise == 0
    for level in found[1:]:
        # K³ roundings of float64 in systems of condition 1e4 and less
        scale = max(base, level.rise)
        assert level.rise == pytest.approx(value(moments, prior, level.writer) - base, abs=1e-8 * scale)
        if level.count and attention:
            heads = KeptHeads(group_rows(config), 12, level.count, config.group_heads[0])
            fits = fit_block(Objective(), moments, writers, [RIDGE], heads=heads)
            expected = torch.cat([writer.weight for writer in fits.writers[RIDGE].values()], dim=1).mT
            assert relative_error(level.writer.weight, expected) < 1e-8
    if counts[-1] == 0 and len(block.parts) == 1:
        gone = type(block)(block.index, block.layer, (), block.dense_parts, block.shortcut)
        (constant,) = remaining_writers(gone, writers).values()
        assert constant.weight.shape == (48, 0)
        assert not found[-1].writer.weight.any()
        assert relative_error(found[-1].writer.bias, moments.outputs / moments.tokens) < 1e-12


def test_impossible_counts():
    config, _, writers, moments = collected("llama", 0)
    for counts in ([1, 2], [3], [1, 1], [-1]):
        with pytest.raises(SliceGPTError, match=r"counts: must be descending, in \[0, 2\], got"):
            list(levels(config, Objective(), moments, writers, RIDGE, "attention", counts))
