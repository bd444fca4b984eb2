"""From a size to configurations: a slicing fraction, a list of widths, or the elements or bytes to store at most."""

import math
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig

from slicegpt.conversion.multiples import multiple_of
from slicegpt.conversion.plan import (
    Shape,
    constant_widths,
    head_dim,
    keeps_its_columns,
    neurons_for,
    plan,
    whole_neurons,
    width_for_slice,
)
from slicegpt.conversion.quantization import WeightFormat, common_multiple, with_quantization
from slicegpt.conversion.speed_plan import step_units, target_units
from slicegpt.conversion.stock import keeps_width, stock_parameters
from slicegpt.conversion.stock_plan import last_that, stock_for_parameters, untied
from slicegpt.errors import SliceGPTError, renamed
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import stored_bytes, stored_parameters
from slicegpt.recipe import AUTO, OBJECTIVE, PRICES, SLICED, STOCK, Recipe
from slicegpt.step_times import StepTimes

# Fractions of the columns that are deleted in the plans whose prices are compared with those of the full width.
NARROWER = (1 / 32, 1 / 16, 1 / 8, 1 / 4)

# Of its neurons a network keeps this fraction at least; a smaller one has fewer columns.
FEWEST_KEPT = 1 / 8


def settled(recipe: Recipe, fields: dict, device: torch.device | str = "cpu") -> Recipe:
    """The recipe with what follows from other choices, the model and the device, so that it repeats anywhere.

    Args:
        fields: `slicegpt.families.canonical_fields` of the dense model.
        device: that the model is sliced on.
    """
    multiple = multiple_of(recipe.round_to, fields["dense_hidden_size"], device, recipe.form)
    if recipe.round_to == AUTO:
        multiple = common_multiple(multiple, WeightFormat.of(recipe))
    return recipe.override(round_to=multiple).resolved()


def plan_recipe(
    recipe: Recipe,
    fields: dict,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    source: PreTrainedConfig | None = None,
) -> SlicedConfig:
    """The first of `plan_choices`."""
    return plan_choices(recipe, fields, dtype, device, source)[0]


def plan_choices(
    recipe: Recipe,
    fields: dict,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    source: PreTrainedConfig | None = None,
) -> list[SlicedConfig]:
    """The configurations that a recipe leaves open: one, or several of the same size, the widest first.

    Args:
        recipe: with a size.
        fields: `slicegpt.families.canonical_fields` of the dense model.
        dtype: of the weights, which `target_bytes` are counted in.
        device: that the model is sliced on, where `round_to` is "auto".
        source: the dense model's config, which a stock form is counted by.

    Raises:
        SliceGPTError: the recipe has no size, or the model cannot have it; the argument is the size's name.
    """
    recipe = settled(recipe, fields, device)
    shape, size = Shape.of(recipe), recipe.size
    if recipe.untie:
        fields = untied(fields)
    weights = WeightFormat.of(recipe)
    count = stored_parameters if recipe.form != STOCK else partial(stock_parameters, source=source)
    with renamed(slice=size, widths=size, target=size):
        choices = _plan_size(recipe, fields, dtype, shape, count)
    if recipe.untie and (stored := count(choices[0])) >= choices[0].source_parameters:
        raise SliceGPTError(
            f"with a head of its own the model would store {stored} elements at this size, the dense one stores"
            f" {choices[0].source_parameters}",
            "untie",
        )
    return [with_quantization(config, weights) for config in choices]


def _plan_size(
    recipe: Recipe,
    fields: dict,
    dtype: torch.dtype,
    shape: Shape,
    count: Callable[[SlicedConfig], int],
) -> list[SlicedConfig]:
    """`plan_choices` for the one size that a recipe asks for."""
    if recipe.size == "widths":
        return [plan(fields, recipe.widths, shape)]
    if recipe.size == "slice":
        width = width_for_slice(fields["dense_hidden_size"], recipe.slice, width_step(fields, shape))
        return [plan(fields, constant_widths(fields, width, shape.slice_head), shape)]
    if recipe.size == "target_speedup":
        return _plan_speedup(recipe, fields, shape)
    if recipe.size == "keep":
        target = int(recipe.keep * fields["source_parameters"])
    elif (weights := WeightFormat.of(recipe)) is not None:

        def bytes_of(config: SlicedConfig) -> int:
            return stored_bytes(with_quantization(config, weights), dtype)

        return [plan_for_parameters(fields, int(recipe.target_bytes), shape, bytes_of, "bytes")]
    else:
        target = int(recipe.target_bytes / dtype.itemsize)
    return choices_for_parameters(
        fields, target, shape, recipe.allocate, count, whole_steps=WeightFormat.of(recipe) is not None
    )


def _plan_speedup(recipe: Recipe, fields: dict, shape: Shape) -> list[SlicedConfig]:
    """`plan_choices` for a speed-up: what is counted is the time of a decoding step."""
    if recipe.step_times is None:
        raise SliceGPTError(
            "needs step_times; `slicegpt.runtime.step_times.with_step_times` measures them", "target_speedup"
        )
    if fields.get("num_experts"):
        raise SliceGPTError(
            f"is not for mixtures of experts, got {recipe.target_speedup:g} for a model of them",
            "target_speedup",
        )
    times = StepTimes.parse(recipe.step_times)
    target = target_units(fields, recipe.target_speedup, times)
    try:
        return choices_for_parameters(
            fields, target, shape, recipe.allocate, partial(step_units, times=times)
        )
    except SliceGPTError as error:
        if error.argument != "target":
            raise
        raise SliceGPTError(
            f"cannot be reached by what may be deleted, got {recipe.target_speedup:g}", "target_speedup"
        ) from None


def width_step(fields: dict, shape: Shape) -> int:
    """What widths are multiples of; transformers' classes ask for whole columns a head, whatever a head's size."""
    step = multiple_of(shape.round_to, fields["dense_hidden_size"], form=shape.form)
    return math.lcm(step, fields["num_attention_heads"]) if shape.form != SLICED else step


def choices_for_parameters(
    fields: dict,
    target: int,
    shape: Shape,
    allocate: str,
    count: Callable[[SlicedConfig], int] = stored_parameters,
    whole_steps: bool = False,
) -> list[SlicedConfig]:
    """Configurations that store at most `target` elements, the widest first: what `allocate` chooses from.

    Where the number of neurons is open (`shape.neurons` is None), the full width with fewer neurons is the first
    choice, and the only one of "uniform"; "prices" compares it with narrower networks. Where the full width does not
    reach the size, and for "objective", there is the one of `plan_for_parameters`, with columns and neurons in step.

    Args:
        allocate: as `Recipe.allocate`.
        count: what is counted.
        whole_steps: numbers of neurons are multiples of `round_to` before they are shared out, too: groups of columns
            that share a scale are counted by them.
    """
    # Dense shortcuts are asked for by name, and at full width there would be none.
    asked = shape.orientation != "aligned" or shape.slice_head or shape.shortcut == "dense"
    open_width = shape.form == SLICED and not asked
    if keeps_its_columns(fields) or shape.neurons is not None or allocate == OBJECTIVE or not open_width:
        return [plan_for_parameters(fields, target, shape, count)]
    dense_width, dense = fields["dense_hidden_size"], fields["intermediate_size"]
    step = multiple_of(shape.round_to, dense_width)
    if fields.get("num_experts"):
        return [_plan_of_experts(fields, target, shape, count, step)]
    # Shared out among the layers they are multiples all the same, and their sum is as large as there is room for.
    unit = 1 if allocate == PRICES and not whole_steps else step
    fractions = (0.0, *NARROWER) if allocate == PRICES else (0.0,)
    found: list[SlicedConfig] = []
    for width in dict.fromkeys(width_for_slice(dense_width, fraction, step) for fraction in fractions):
        if width < head_dim(fields):
            break
        neurons = _most_neurons(fields, width, shape, target, count, unit)
        # Where shortcuts take more than the columns gave, it is the wider network that has more of both.
        more = not found or (neurons is not None and neurons > found[-1].intermediate_size)
        if more and neurons is not None and neurons >= FEWEST_KEPT * dense:
            found.append(plan(fields, constant_widths(fields, width), shape, neurons))
        if neurons == dense:  # narrower networks are smaller than asked for
            break
    return found or [plan_for_parameters(fields, target, shape, count)]


def _plan_of_experts(
    fields: dict, target: int, shape: Shape, count: Callable[[SlicedConfig], int], step: int
) -> SlicedConfig:
    """The full width with fewer neurons an expert, and where these would be too few, columns and neurons in step."""
    whole, widths = whole_neurons(fields), constant_widths(fields, fields["dense_hidden_size"])
    fewest = min(whole, -(-int(FEWEST_KEPT * whole) // step) * step or step)
    if count(plan(fields, widths, shape, fewest)) > target:
        return plan_for_parameters(fields, target, shape, count)
    return _plan_of_neurons(fields, target, shape, count)


def _most_neurons(
    fields: dict,
    width: int,
    shape: Shape,
    target: int,
    count: Callable[[SlicedConfig], int],
    step: int,
) -> int | None:
    """Neurons that a network of one width has room for, a multiple of `step` or all of them; None: for none."""
    dense, widths = fields["intermediate_size"], constant_widths(fields, width)

    def at(neurons: int) -> int:
        return count(plan(fields, widths, shape, neurons))

    most, least = at(dense), at(min(step, dense))
    if most <= target:
        return dense
    if least > target:
        return None
    # What is stored is linear in the neurons.
    each = (most - least) // (dense - step)
    return (step + (target - least) // each) // step * step


def plan_for_parameters(
    fields: dict,
    target: int,
    shape: Shape,
    count: Callable[[SlicedConfig], int] = stored_parameters,
    unit: str = "elements",
) -> SlicedConfig:
    """The widest constant width whose model stores at most `target` elements (a multiple of `round_to`, or D).

    Where `shape.neurons` is None, as many neurons as then fit stay, also in multiples of `round_to`.

    Args:
        count: what is counted: `stored_parameters`, or `decoder_parameters` for the layers alone.
        unit: of what is counted.
    """
    dense_width, step = fields["dense_hidden_size"], width_step(fields, shape)
    first = -(-head_dim(fields) // step)
    widths = [step * k for k in range(first, -(-dense_width // step))] + [dense_width]
    if keeps_its_columns(fields):
        return _plan_of_neurons(fields, target, shape, count)
    if shape.form != SLICED and keeps_width(fields) is not None:
        widths = [dense_width]

    def at(width: int, neurons: int | None = None) -> SlicedConfig:
        return plan(fields, constant_widths(fields, width, shape.slice_head), shape, neurons)

    def fits(config: SlicedConfig) -> bool:
        return count(config) <= target

    if shape.form != SLICED and shape.neurons is None:
        neurons = multiple_of(shape.round_to, dense_width, form=shape.form)
        return stock_for_parameters(fields, target, widths, at, count, neurons)
    if not fits(smallest := at(widths[0])):
        raise SliceGPTError(
            f"{target} {unit} cannot be reached; at width {widths[0]}, the smallest multiple of {step} that "
            f"holds an attention head, the model stores {count(smallest)}",
            "target",
        )
    # At full width the projections and shortcuts vanish, so D may store less than the width before it; below, every
    # column costs its rows in the linear layers, which is more than a compact shortcut ever saves by it.
    if fits(dense := at(dense_width)):
        return dense
    width = widths[last_that(lambda index: fits(at(widths[index])), len(widths) - 1)]
    if shape.neurons is not None:
        return at(width)
    neurons = neurons_for(fields, constant_widths(fields, width), shape)
    choices = [*range(neurons, whole_neurons(fields), step), whole_neurons(fields)]
    return at(width, choices[last_that(lambda index: fits(at(width, choices[index])), len(choices))])


def _plan_of_neurons(
    fields: dict, target: int, shape: Shape, count: Callable[[SlicedConfig], int]
) -> SlicedConfig:
    """As many neurons at full width as fit, in multiples of `round_to`; or as many as `shape` says, if they fit."""
    widths, whole = constant_widths(fields, fields["dense_hidden_size"]), whole_neurons(fields)
    step = multiple_of(shape.round_to, fields["dense_hidden_size"])
    choices = [*range(min(step, whole), whole, step), whole]
    if shape.neurons is not None:
        choices = [neurons_for(fields, widths, shape)]
    if count(smallest := plan(fields, widths, shape, choices[0])) > target:
        more = "; give no neurons, and as many go as it takes" if shape.neurons is not None else ""
        raise SliceGPTError(
            f"{target} elements cannot be reached; with {choices[0]} neurons in an MLP, and all columns of the stream, "
            f"the model stores {count(smallest)}{more}",
            "target",
        )
    fits = last_that(lambda index: count(plan(fields, widths, shape, choices[index])) <= target, len(choices))
    return plan(fields, widths, shape, choices[fits])
