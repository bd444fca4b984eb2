"""The multiple of widths and neurons, and how near a planned size comes to the one that was asked for."""

import pytest
import torch

from slicegpt.bench.models.architectures import fields_of
from slicegpt.conversion.multiples import multiple_of
from slicegpt.conversion.size_plan import plan_recipe, settled
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.recipe import Recipe


@pytest.mark.parametrize(
    ("round_to", "width", "device", "expected"),
    [
        ("auto", 576, "cpu", 8),
        ("auto", 4096, "cpu", 8),
        ("auto", 576, "cuda", 8),
        ("auto", 2040, "cuda:1", 8),
        ("auto", 2048, "cuda:1", 64),
        ("auto", 4096, torch.device("cuda"), 64),
        (24, 4096, "cuda", 24),
        (1, 4096, "cpu", 1),
    ],
)
def test_multiples(round_to, width, device, expected):
    assert multiple_of(round_to, width, device) == expected


@pytest.mark.parametrize("round_to", [0, -8, "8"])
def test_no_multiple(round_to):
    with pytest.raises(SliceGPTError, match=f"round_to: must be at least 1 or auto, got {round_to}"):
        multiple_of(round_to, 576)


def test_a_settled_recipe_repeats_on_another_device():
    fields = {"dense_hidden_size": 4096}
    recipe = Recipe(keep=0.9)
    assert settled(recipe, fields, "cuda").round_to == 64
    again = settled(settled(recipe, fields, "cuda"), fields, "cpu")
    assert again == settled(recipe, fields, "cuda")
    assert settled(Recipe(keep=0.9, round_to=24), fields, "cuda").round_to == 24


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-1b", "llama-2-7b"])
@pytest.mark.parametrize("keep", [0.9, 0.7])
def test_a_size_is_met_from_below_within_a_step_of_neurons(name, device, keep):
    """Neurons are the fine currency: at most one step of them in every layer is left over."""
    fields = fields_of(name)
    config = plan_recipe(Recipe(keep=keep), fields, torch.float32, device)
    got = stored_parameters(config) / fields["source_parameters"]
    multiple = multiple_of("auto", fields["dense_hidden_size"], device)
    # A neuron stores a row of the gate, one of up and a column of down, each at most as long as the stream is wide.
    step = (
        multiple * 3 * fields["dense_hidden_size"] * fields["num_hidden_layers"] / fields["source_parameters"]
    )
    assert step < (0.005 if (name, device) != ("llama-1b", "cuda") else 0.01)
    assert keep - step < got <= keep
    assert config.boundary_widths[0] % multiple == 0
    # Shared out among the layers, neurons are multiples; so they are where they are not.
    uniform = plan_recipe(Recipe(keep=keep, allocate="uniform"), fields, torch.float32, device)
    assert uniform.intermediate_size % multiple == 0
    assert 0 <= config.intermediate_size - uniform.intermediate_size < multiple


@pytest.mark.parametrize("size", ["400MB", 400e6, "381.4697265625MiB"])
def test_bytes(size):
    fields = fields_of("smollm2-135m")
    config = plan_recipe(Recipe(target_bytes=size), fields, torch.float32)
    assert 0.995 * 400e6 <= 4 * stored_parameters(config) <= 400e6
    # In 16 bits the whole model is smaller than that.
    assert plan_recipe(Recipe(target_bytes=size), fields, torch.float16).boundary_widths[0] == 576


def test_without_the_refit_columns_alone_come_as_near_as_one_step_of_them():
    fields = fields_of("smollm2-135m")
    config = plan_recipe(Recipe(keep=0.9, refit=False), fields, torch.float32)
    assert config.intermediate_size == fields["intermediate_size"]
    got = stored_parameters(config) / fields["source_parameters"]
    # 8 of 576 columns of everything but the embedding table, whose rows the projection only grows beside.
    assert 0.9 - 8 / 576 <= got <= 0.9
