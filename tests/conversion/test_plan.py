"""Widths and shortcut kinds, and the search for a true size."""

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.bench.models.architectures import fields_of
from slicegpt.conversion.plan import Shape, constant_widths, plan, width_for_slice
from slicegpt.conversion.size_plan import plan_choices, plan_for_parameters
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.recipe import ALLOCATIONS, Recipe

FIELDS = canonical_fields(tiny_model("llama"))
TIED = canonical_fields(tiny_model("llama-tied"))


@pytest.mark.parametrize(
    ("dense", "fraction", "multiple", "width"),
    [
        (576, 0.2, 8, 456),  # the published rule rounds down
        (576, 0.125, 8, 504),
        (4096, 0.25, 64, 3072),
        (4096, 0.3, 8, 2864),
        (640, 0.9, 64, 64),  # (1 - 0.9) * 640 is 63.99... in floating point
        (576, 0.0, 64, 576),
        (2560, 0.0, 64, 2560),
    ],
)
def test_width_for_slice(dense, fraction, multiple, width):
    assert width_for_slice(dense, fraction, multiple) == width


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(SliceGPTError, match=r"slice: must lie in \[0, 1\), got"):
        width_for_slice(576, fraction, 8)


def test_compact_kinds():
    config = plan(FIELDS, constant_widths(FIELDS, 40), Shape(round_to=8))
    assert config.shortcuts == ["compact"] * 6
    assert [config.shortcut_rank(block) for block in range(6)] == [8] * 5 + [0]


def test_compact_falls_back_to_dense_where_it_would_store_more():
    # D - d >= d: the factor would be as large as the matrix.
    config = plan(FIELDS, constant_widths(FIELDS, 24), Shape(round_to=8))
    assert config.shortcuts == ["dense"] * 5 + ["compact"]


def test_varying_widths():
    widths = [40, 32, 40, 40, 48, 48, 48]
    config = plan(FIELDS, widths, Shape())
    assert config.shortcuts == ["dense", "compact", "compact", "compact", "identity", "identity"]


def test_tied_head_fixes_the_last_basis():
    config = plan(TIED, constant_widths(TIED, 40), Shape(round_to=8))
    assert config.shortcuts[-1] == "dense"
    assert config.embed_projection
    assert config.final_norm_weight
    sliced_head = plan(TIED, constant_widths(TIED, 40, slice_head=True), Shape(slice_head=True))
    assert sliced_head.shortcuts[-1] == "compact"
    assert sliced_head.head_projection
    assert not sliced_head.final_norm_weight
    assert sliced_head.hidden_size == 48


@pytest.mark.parametrize("fields", [FIELDS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("fraction", [0.7, 0.8, 0.9, 1.0])
def test_plan_for_parameters_is_the_widest_that_fits(fields, fraction):
    shape, target = Shape(round_to=4), int(fraction * fields["source_parameters"])
    config = plan_for_parameters(fields, target, shape)
    sizes = {
        width: stored_parameters(plan(fields, constant_widths(fields, width), shape))
        for width in range(12, 49, 4)
    }
    assert stored_parameters(config) <= target
    assert config.boundary_widths[0] == max(width for width, size in sizes.items() if size <= target)


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("keep", [0.8, 0.95])
def test_neurons_of_four_bits_are_whole_groups(keep, allocate):
    """At any size: columns of a scale are counted before neurons are shared out among the layers."""
    fields = fields_of("smollm2-135m") | {"num_hidden_layers": 2}
    choices = plan_choices(Recipe(keep=keep, quantize="int4", allocate=allocate), fields, torch.float32)
    for config in choices:
        assert all(count % 32 == 0 for count in config.neurons)


def test_unreachable_size():
    with pytest.raises(SliceGPTError, match="target: 1000 elements cannot be reached; at width 16"):
        plan_for_parameters(FIELDS, 1000, Shape(round_to=8))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([40] * 5, "widths: must be 7, one a boundary, got 5"),
        ([40] * 6 + [49], "boundary 6 must be a whole number up to 48, got 49"),
        ([40.0] * 7, "boundary 0 must be a whole number"),
        ([40] * 3 + [8] + [40] * 3, "boundary 3 would keep 8 of 48 columns, less than one attention head"),
    ],
)
def test_impossible_widths(widths, message):
    with pytest.raises(SliceGPTError, match=message):
        plan(FIELDS, widths, Shape())


def test_compact_needs_aligned_bases():
    with pytest.raises(SliceGPTError, match="compact shortcuts need 'aligned' bases, got 'random'"):
        Shape("compact", "random")
