"""Configurations by the time that a decoding step takes with them."""

import pytest
import torch

from slicegpt.bench.models.architectures import fields_of
from slicegpt.conversion.size_plan import plan_choices
from slicegpt.conversion.speed_plan import dense_config, layer_elements, step_units, target_units
from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import decoder_parameters
from slicegpt.recipe import Recipe
from slicegpt.step_times import StepTimes

LAYERS = 4  # of SmolLM2's 30
TIMES = StepTimes(3e-4, 1e-4, 4e-10, 5e-10, 6e-10)
FIELDS = fields_of("smollm2-135m") | {"num_hidden_layers": LAYERS}


def speedup(config: SlicedConfig) -> float:
    return step_units(dense_config(FIELDS), TIMES) / step_units(config, TIMES)


def test_all_elements_of_the_layers_are_counted():
    for config in (dense_config(FIELDS), *plan_choices(Recipe(keep=0.8), FIELDS, torch.float32)):
        assert sum(layer_elements(config).values()) == decoder_parameters(config)
    assert layer_elements(dense_config(FIELDS))["shortcut"] == 0
    assert layer_elements(dense_config(FIELDS))["mlp"] == LAYERS * 3 * 576 * 1536


@pytest.mark.parametrize("allocate", ["prices", "objective", "uniform"])
@pytest.mark.parametrize("asked", [1.1, 1.4])
def test_a_plan_is_as_fast_as_asked_and_hardly_faster(asked, allocate):
    recipe = Recipe(target_speedup=asked, step_times=str(TIMES), allocate=allocate)
    choices = plan_choices(recipe, FIELDS, torch.float32)
    assert len(choices) > 1 if allocate == "prices" else len(choices) == 1
    for config in choices:
        assert speedup(config) >= asked
        # One step of what it is made of, 8 neurons in all layers: 22 us of a step of 6.4 ms. A network with fewer
        # columns may be faster than asked with all of its neurons.
        assert speedup(config) < asked * 1.006 or (config is not choices[0] and config.neurons[0] == 1536)


def test_columns_cost_what_their_shortcuts_take():
    slow = StepTimes(3e-4, 1e-4, 4e-10, 5e-10, 6e-9)
    fewest = []
    for times in (TIMES, slow):
        recipe = Recipe(target_speedup=1.2, step_times=str(times))
        fewest.append(
            {plan.boundary_widths[0]: plan.neurons[0] for plan in plan_choices(recipe, FIELDS, torch.float32)}
        )
    for width in fewest[0].keys() & fewest[1].keys() - {576}:
        assert fewest[1][width] < fewest[0][width]
    assert fewest[0][576] == fewest[1][576]


def test_what_cannot_be_reached():
    most = step_units(dense_config(FIELDS), TIMES) / 1e15 / (3e-4 + LAYERS * 1e-4)
    with pytest.raises(SliceGPTError, match=rf"target_speedup: must be less than {most:.2f}: .*, got 50"):
        target_units(FIELDS, 50.0, TIMES)
    recipe = Recipe(target_speedup=most * 0.99, step_times=str(TIMES))
    with pytest.raises(SliceGPTError, match="target_speedup: cannot be reached by what may be deleted"):
        plan_choices(recipe, FIELDS, torch.float32)
    with pytest.raises(SliceGPTError, match="target_speedup: needs step_times"):
        plan_choices(Recipe(target_speedup=1.1), FIELDS, torch.float32)
