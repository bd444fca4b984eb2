"""How wide every boundary is: from a slicing fraction, a true size to reach, or a list of widths."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from transformers import PreTrainedConfig

from slicegpt.conversion.multiples import multiple_of
from slicegpt.conversion.quantization import WeightFormat, common_multiple, with_quantization
from slicegpt.conversion.stock import keeps_width, stock_parameters
from slicegpt.conversion.stock_plan import check_stock_widths, last_that, stock_for_parameters, untied
from slicegpt.errors import SliceGPTError, renamed
from slicegpt.families import FAMILIES
from slicegpt.modeling import SlicedConfig, factor_rank
from slicegpt.modeling.sizes import stored_bytes, stored_parameters
from slicegpt.recipe import (
    AUTO,
    FORMS,
    OBJECTIVE,
    ORIENTATIONS,
    PRICES,
    SHORTCUT_MODES,
    SLICED,
    STOCK,
    Recipe,
)

# MLP neurons that are deleted beside columns where a true size is asked for and no prices are taken, as fractions of
# each: about the ratio of the least loss on held-out calibration text, at 90 and at 80 % of SmolLM2-135M's decoder
# (docs/quality.md).
NEURONS_TO_COLUMNS = 8.0

# Fractions of the columns that are deleted in the plans whose prices are compared with those of the full width.
NARROWER = (1 / 32, 1 / 16, 1 / 8, 1 / 4)

# Of its neurons a network keeps this fraction at least; a smaller one has fewer columns.
FEWEST_KEPT = 1 / 8


@dataclass(frozen=True)
class Shape:
    """What decides a sliced model's shape besides its widths.

    Attributes:
        shortcut: "compact" stores a factor wherever it holds fewer numbers than the matrix; "dense" never.
        orientation: "aligned", "random" or "pca"; compact shortcuts need aligned bases.
        slice_head: the last boundary, which the head reads, is sliced too.
        round_to: widths and numbers of neurons are multiples of it (the published code uses 8), see
            `slicegpt.conversion.multiples`; "auto" is then a CPU's.
        neurons: the fraction of MLP neurons to delete; None takes `NEURONS_TO_COLUMNS` times that of the columns, and
            in the stock form neurons first, see `slicegpt.conversion.stock_plan`.
        form: "sliced", "stock" or "per-layer", see `slicegpt.recipe.Recipe`; the latter two have no shortcuts.
        kv_groups: key/value groups that every layer keeps, or each of them; None: all.
        group_heads: query heads that every one of these groups keeps, or those of each layer; None: all.
    """

    shortcut: str = "compact"
    orientation: str = "aligned"
    slice_head: bool = False
    round_to: int | str = AUTO
    neurons: float | None = 0.0
    form: str = SLICED
    kv_groups: int | tuple[int, ...] | None = None
    group_heads: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.neurons is not None and not 0 <= self.neurons < 1:
            raise SliceGPTError(f"must lie in [0, 1), got {self.neurons}", "neurons")
        if self.shortcut not in SHORTCUT_MODES:
            allowed = ", ".join(SHORTCUT_MODES)
            raise SliceGPTError(f"must be one of {allowed}, got {self.shortcut!r}", "shortcut")
        if self.orientation not in ORIENTATIONS:
            allowed = ", ".join(ORIENTATIONS)
            raise SliceGPTError(f"must be one of {allowed}, got {self.orientation!r}", "orientation")
        if self.shortcut == "compact" and self.orientation != "aligned":
            raise SliceGPTError(
                f"compact shortcuts need 'aligned' bases, got {self.orientation!r}; dense ones take it",
                "orientation",
            )
        if self.form not in FORMS:
            raise SliceGPTError(f"must be one of {', '.join(FORMS)}, got {self.form!r}", "form")
        multiple_of(self.round_to, 1)  # an error where it is none

    @classmethod
    def of(cls, recipe: Recipe) -> "Shape":
        """The shape that a recipe asks for; its `round_to` is a number (`settled`)."""
        recipe = recipe.resolved()
        neurons = None if recipe.neurons == AUTO else recipe.neurons
        return cls(
            recipe.shortcut or "compact",
            recipe.orientation,
            recipe.slice_head or recipe.form != SLICED,
            recipe.round_to,
            neurons,
            recipe.form,
            recipe.kv_groups,
            recipe.group_heads,
        )


def width_for_slice(dense_width: int, fraction: float, round_to: int) -> int:
    """Columns left at slicing `fraction` (`1 - d / D`), rounded down to a multiple of `round_to`.

    Rounding down is the published rule (there to multiples of 8): at least the asked fraction goes. A fraction
    of 0 keeps every column.
    """
    if not 0 <= fraction < 1:
        raise SliceGPTError(f"must lie in [0, 1), got {fraction}", "slice")
    if fraction == 0:
        return dense_width
    # Nine decimals: 0.3 * 4096 is not a float, and a last-bit error must not cost a multiple.
    return int(round((1 - fraction) * dense_width, 9)) // round_to * round_to


def constant_widths(fields: dict, width: int, slice_head: bool = False) -> list[int]:
    """The same width at every boundary; the last one, which the head reads, keeps D unless `slice_head`."""
    blocks = fields["num_hidden_layers"] * (1 if fields.get("parallel_blocks") else 2)
    return [width] * blocks + [width if slice_head else fields["dense_hidden_size"]]


def neurons_for(fields: dict, widths: Sequence[int], shape: Shape) -> int:
    """MLP neurons left, rounded down to a multiple of `round_to` (but at least one of it), or all of them."""
    dense = fields["intermediate_size"]
    step = multiple_of(shape.round_to, fields["dense_hidden_size"], form=shape.form)
    fraction = shape.neurons
    if fraction is None:
        columns = 1 - sum(widths[:-1]) / (len(widths) - 1) / fields["dense_hidden_size"]
        fraction = min(NEURONS_TO_COLUMNS * columns, 1.0)
    if fraction == 0:
        return dense
    return min(dense, max(step, int(round((1 - fraction) * dense, 9)) // step * step))


def key_value_heads(fields: dict, kept: int | Sequence[int] | None) -> list[int] | None:
    """Key/value heads that each layer keeps; None where all keep all.

    Args:
        kept: of every layer, or a list with one number a layer.

    Raises:
        SliceGPTError: a number that is not that of some of a layer's groups, or no attention in any layer.
    """
    if kept is None:
        return None
    layers = fields["num_hidden_layers"]
    groups = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    counts = [kept] * layers if isinstance(kept, int) else list(kept)
    if len(counts) != layers:
        raise SliceGPTError(f"must be one number, or {layers}, one a layer, got {len(counts)}", "kv_groups")
    if not all(0 <= count <= groups for count in counts):
        raise SliceGPTError(
            f"must lie in [0, {groups}], the key/value groups of a layer, got {_shown(kept)}", "kv_groups"
        )
    if not any(counts):
        raise SliceGPTError(f"one layer at least must keep attention, got {_shown(kept)}", "kv_groups")
    return None if min(counts) == groups else counts


def heads_of_groups(fields: dict, kept: int | Sequence[int] | None) -> list[int] | None:
    """Query heads that the key/value groups of each layer keep; None where all keep all.

    Args:
        kept: in every layer, or a list with one number a layer.

    Raises:
        SliceGPTError: a number that is not that of some of a group's heads.
    """
    if kept is None:
        return None
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    shared = heads // (fields.get("num_key_value_heads") or heads)
    counts = [kept] * layers if isinstance(kept, int) else list(kept)
    if len(counts) != layers:
        raise SliceGPTError(f"must be one number, or {layers}, one a layer, got {len(counts)}", "group_heads")
    if not all(1 <= count <= shared for count in counts):
        raise SliceGPTError(
            f"must lie in [1, {shared}], the query heads of a key/value group, got {_shown(kept)}",
            "group_heads",
        )
    return None if min(counts) == shared else counts


def check_whole_norms(fields: dict, heads: list[int] | None, fewer: list[int] | None) -> None:
    """Refuse to delete some of the heads that one norm is over: its divisor would be another one."""
    if not fields.get("qk_norm_whole"):
        return
    groups = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    if fewer is not None or (heads is not None and set(heads) - {0, groups}):
        raise SliceGPTError(
            f"{fields['source_model_type']} norms queries and keys over all heads together: a layer keeps all of its "
            f"{groups} groups or none, got {_shown(heads) if fewer is None else 'some heads of a group'}",
            "kv_groups" if fewer is None else "group_heads",
        )


def _shown(kept: int | Sequence[int]) -> str:
    return str(kept) if isinstance(kept, int) else ",".join(map(str, kept))


def head_dim(fields: dict) -> int:
    """Columns of one attention head."""
    return fields.get("head_dim") or fields["dense_hidden_size"] // fields["num_attention_heads"]


def check_widths(fields: dict, widths: Sequence[int]) -> None:
    """One clear error for widths that cannot be: their number, their range, or less than one attention head."""
    needed, dense_width, head = len(constant_widths(fields, 0)), fields["dense_hidden_size"], head_dim(fields)
    if len(widths) != needed:
        raise SliceGPTError(f"must be {needed}, one a boundary, got {len(widths)}", "widths")
    if keeps_its_columns(fields) and any(width != dense_width for width in widths):
        raise SliceGPTError(
            f"{fields['source_model_type']} normalises what its blocks write, by a length that takes all {dense_width}"
            " columns: none of them can be deleted. Delete MLP neurons: slice=0 with neurons=0.25, or keep=0.9"
            " (--slice 0 --neurons 0.25, or --keep 0.9)",
            "widths",
        )
    for boundary, width in enumerate(widths):
        if isinstance(width, bool) or not isinstance(width, int) or width > dense_width:
            raise SliceGPTError(
                f"boundary {boundary} must be a whole number up to {dense_width}, got {width!r}", "widths"
            )
        if width < head:
            raise SliceGPTError(
                f"boundary {boundary} would keep {width} of {dense_width} columns, less than one attention head "
                f"({head}); slice less, or round to a smaller multiple",
                "widths",
            )


def keeps_its_columns(fields: dict) -> bool:
    """Whether the stream of a model must keep its columns and its basis: norms behind the blocks need them."""
    return bool(fields.get("post_norm"))


def choose_shortcuts(
    fields: dict, widths: Sequence[int], shape: Shape, deleted: Sequence[bool] | None = None
) -> list[str]:
    """The kind of every shortcut.

    A narrower next boundary has no compact form, and a tied head fixes the last basis, so those stay dense. A block of
    which nothing is left leaves the stream in its basis, where it may be as wide.

    Args:
        deleted: of each block, whether all of its parts are; None: of none.
    """
    dense_width = fields["dense_hidden_size"]
    if keeps_its_columns(fields) and (shape.orientation != "aligned" or shape.form != SLICED):
        name, value = ("form", shape.form) if shape.form != SLICED else ("orientation", shape.orientation)
        wanted = SLICED if name == "form" else "aligned"
        raise SliceGPTError(
            f"{fields['source_model_type']} normalises what its blocks write, in the model's own basis: it must be "
            f"{wanted!r}, got {value!r}",
            name,
        )
    if shape.form != SLICED:
        check_stock_widths(fields, widths)
        return ["identity"] * (len(widths) - 1)
    if shape.orientation == "aligned" and all(width == dense_width for width in widths):
        return ["identity"] * (len(widths) - 1)
    kinds = []
    for block, (width, following) in enumerate(pairwise(widths)):
        fixed = fields["tie_word_embeddings"] and following == dense_width and block == len(widths) - 2
        rank = factor_rank(dense_width, width, following)
        if deleted is not None and deleted[block] and width == following and not fixed:
            kinds.append("identity")
        elif shape.shortcut == "dense" or width > following or fixed or rank >= following:
            kinds.append("dense")
        else:
            kinds.append("identity" if rank == 0 and width == following else "compact")
    return kinds


def plan(
    fields: dict,
    widths: Sequence[int],
    shape: Shape | None = None,
    neurons: int | Sequence[int] | None = None,
    kv_groups: int | Sequence[int] | None = None,
    group_heads: int | Sequence[int] | None = None,
) -> SlicedConfig:
    """The configuration of the sliced model: all of it but the numbers is known before slicing.

    Args:
        fields: `slicegpt.families.canonical_fields` of the dense model.
        widths: one a boundary.
        shape: shortcuts, orientation, the fraction of neurons and the key/value groups.
        neurons: of an MLP, or of each layer's; None: as `shape` says. A layer may keep none.
        kv_groups: that every layer keeps, or each; None: as `shape` says. A layer may keep none, but not all of them.
        group_heads: query heads of a group, in every layer or in each; None: as `shape` says.
    """
    shape = shape or Shape()
    check_widths(fields, widths)
    kv_groups = shape.kv_groups if kv_groups is None else kv_groups
    group_heads = shape.group_heads if group_heads is None else group_heads
    heads, fewer = key_value_heads(fields, kv_groups), heads_of_groups(fields, group_heads)
    check_whole_norms(fields, heads, fewer)
    counts = neuron_counts(fields, neurons_for(fields, widths, shape) if neurons is None else neurons)
    kinds = choose_shortcuts(fields, widths, shape, deleted_blocks(fields, heads, counts["layer_neurons"]))
    # A LayerNorm family's table is centred on its way in, which one shared with the head cannot be.
    untouched = set(kinds) == {"identity"} and not FAMILIES[fields["source_model_type"]].mean_subtraction
    tied = fields["tie_word_embeddings"]
    return SlicedConfig(
        **fields
        | {
            "dense_intermediate_size": fields["intermediate_size"],
            "layer_key_value_heads": heads,
            "layer_group_heads": fewer,
        }
        | counts,
        boundary_widths=list(widths),
        shortcuts=kinds,
        embed_projection=tied and not untouched,
        final_norm_weight=tied and widths[-1] == fields["dense_hidden_size"],
    )


def neuron_counts(fields: dict, neurons: int | Sequence[int]) -> dict:
    """The fields of `SlicedConfig` that say how many neurons there are, the same in every layer or one number each."""
    if isinstance(neurons, int):
        return {"intermediate_size": neurons, "layer_neurons": None}
    layers, dense = fields["num_hidden_layers"], fields["intermediate_size"]
    if len(neurons) != layers or not all(0 <= count <= dense for count in neurons):
        raise SliceGPTError(
            f"must be {layers} numbers in [0, {dense}], one a layer, got {neurons}", "neurons"
        )
    return {"intermediate_size": max(neurons), "layer_neurons": list(neurons)}


def deleted_blocks(fields: dict, heads: list[int] | None, neurons: list[int] | None) -> list[bool]:
    """Of each block, whether nothing of it is left; arguments as in `SlicedConfig`, None for all."""
    layers = range(fields["num_hidden_layers"])
    attention = [heads is not None and not heads[layer] for layer in layers]
    mlp = [neurons is not None and not neurons[layer] for layer in layers]
    if fields.get("parallel_blocks"):
        return [both[0] and both[1] for both in zip(attention, mlp, strict=True)]
    return [part for both in zip(attention, mlp, strict=True) for part in both]


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
    if recipe.size == "keep":
        target = int(recipe.keep * fields["source_parameters"])
    elif (weights := WeightFormat.of(recipe)) is not None:

        def bytes_of(config: SlicedConfig) -> int:
            return stored_bytes(with_quantization(config, weights), dtype)

        return [plan_for_parameters(fields, int(recipe.target_bytes), shape, bytes_of, "bytes")]
    else:
        target = int(recipe.target_bytes / dtype.itemsize)
    return choices_for_parameters(fields, target, shape, recipe.allocate, count)


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
) -> list[SlicedConfig]:
    """Configurations that store at most `target` elements, the widest first: what `allocate` chooses from.

    Where the number of neurons is open (`shape.neurons` is None), the full width with fewer neurons is the first
    choice, and the only one of "uniform"; "prices" compares it with narrower networks. Where the full width does not
    reach the size, and for "objective", there is the one of `plan_for_parameters`, with columns and neurons in step.

    Args:
        allocate: as `Recipe.allocate`.
        count: what is counted.
    """
    open_width = shape.form == SLICED and shape.orientation == "aligned" and not shape.slice_head
    if keeps_its_columns(fields) or shape.neurons is not None or allocate == OBJECTIVE or not open_width:
        return [plan_for_parameters(fields, target, shape, count)]
    dense_width, dense = fields["dense_hidden_size"], fields["intermediate_size"]
    step = multiple_of(shape.round_to, dense_width)
    # Shared out among the layers they are multiples all the same, and their sum is as large as there is room for.
    unit = 1 if allocate == PRICES else step
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
    choices = [*range(neurons, fields["intermediate_size"], step), fields["intermediate_size"]]
    return at(width, choices[last_that(lambda index: fits(at(width, choices[index])), len(choices))])


def _plan_of_neurons(
    fields: dict, target: int, shape: Shape, count: Callable[[SlicedConfig], int]
) -> SlicedConfig:
    """As many neurons at full width as fit, in multiples of `round_to`; or as many as `shape` says, if they fit."""
    widths, whole = constant_widths(fields, fields["dense_hidden_size"]), fields["intermediate_size"]
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
