"""The shape of a sliced model: its widths, neurons, heads and shortcuts, and the configuration that follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from slicegpt.conversion.multiples import multiple_of
from slicegpt.conversion.stock_plan import check_stock_widths
from slicegpt.errors import SliceGPTError
from slicegpt.families import FAMILIES
from slicegpt.modeling import SlicedConfig, factor_rank
from slicegpt.recipe import AUTO, FORMS, ORIENTATIONS, SHORTCUT_MODES, SLICED, Recipe

# MLP neurons that are deleted beside columns where a true size is asked for and no prices are taken, as fractions of
# each: about the ratio of the least loss on held-out calibration text, at 90 and at 80 % of SmolLM2-135M's decoder
# (docs/quality.md).
NEURONS_TO_COLUMNS = 8.0


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
    """MLP neurons left, rounded down to a multiple of `round_to` (but at least one of it), or all of them; those of
    an expert where there are any."""
    dense = whole_neurons(fields)
    step = multiple_of(shape.round_to, fields["dense_hidden_size"], form=shape.form)
    fraction = shape.neurons
    if fraction is None:
        columns = 1 - sum(widths[:-1]) / (len(widths) - 1) / fields["dense_hidden_size"]
        fraction = min(NEURONS_TO_COLUMNS * columns, 1.0)
    if fraction == 0:
        return dense
    return min(dense, max(step, int(round((1 - fraction) * dense, 9)) // step * step))


def whole_neurons(fields: dict) -> int:
    """The neurons that are deleted from: an expert's where there are any, else an MLP's."""
    return fields["moe_intermediate_size"] if fields.get("num_experts") else fields["intermediate_size"]


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
    """Refuse to delete some of the heads that one norm is over, for its divisor would be another one, or that share
    one latent."""
    latent = fields.get("kv_lora_rank") is not None
    if not fields.get("qk_norm_whole") and not latent:
        return
    groups = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    if fewer is not None or (heads is not None and set(heads) - {0, groups}):
        what = (
            "expands all heads from one latent"
            if latent
            else "norms queries and keys over all heads together"
        )
        raise SliceGPTError(
            f"{fields['source_model_type']} {what}: a layer keeps all of its "
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
        neurons: of an MLP, or of each layer's, or of an expert; None: as `shape` says. A layer without experts may keep
            none.
        kv_groups: that every layer keeps, or each; None: as `shape` says. A layer may keep none, but not all of them.
        group_heads: query heads of a group, in every layer or in each; None: as `shape` says.
    """
    shape = shape or Shape()
    check_widths(fields, widths)
    kv_groups = shape.kv_groups if kv_groups is None else kv_groups
    group_heads = shape.group_heads if group_heads is None else group_heads
    heads, fewer = key_value_heads(fields, kv_groups), heads_of_groups(fields, group_heads)
    check_whole_norms(fields, heads, fewer)
    step = multiple_of(shape.round_to, fields["dense_hidden_size"], form=shape.form)
    counts = neuron_counts(fields, neurons_for(fields, widths, shape) if neurons is None else neurons, step)
    kinds = choose_shortcuts(fields, widths, shape, deleted_blocks(fields, heads, counts["layer_neurons"]))
    # A LayerNorm family's table is centred on its way in, which one shared with the head cannot be.
    untouched = set(kinds) == {"identity"} and not FAMILIES[fields["source_model_type"]].mean_subtraction
    tied = fields["tie_word_embeddings"]
    return SlicedConfig(
        **fields | {"layer_key_value_heads": heads, "layer_group_heads": fewer} | counts,
        boundary_widths=list(widths),
        shortcuts=kinds,
        embed_projection=tied and not untouched,
        final_norm_weight=tied and widths[-1] == fields["dense_hidden_size"],
    )


def neuron_counts(fields: dict, neurons: int | Sequence[int], step: int = 1) -> dict:
    """The fields of `SlicedConfig` that say how many neurons there are, the same in every layer or one number each.

    Where some layers have experts, one number is those of an expert; the other layers keep the same fraction, rounded
    down to a multiple of `step`.
    """
    dense, whole = fields["intermediate_size"], whole_neurons(fields)
    before = {"dense_intermediate_size": dense}
    if fields.get("num_experts"):
        if not isinstance(neurons, int):
            raise SliceGPTError(f"must be one number for a model with experts, got {neurons}", "neurons")
        others = dense if neurons == whole else min(dense, max(step, dense * neurons // whole // step * step))
        before |= {"moe_intermediate_size": neurons, "dense_moe_intermediate_size": whole}
        return before | {"intermediate_size": others, "layer_neurons": None}
    if isinstance(neurons, int):
        return before | {"intermediate_size": neurons, "layer_neurons": None}
    layers = fields["num_hidden_layers"]
    if len(neurons) != layers or not all(0 <= count <= dense for count in neurons):
        raise SliceGPTError(
            f"must be {layers} numbers in [0, {dense}], one a layer, got {neurons}", "neurons"
        )
    return before | {"intermediate_size": max(neurons), "layer_neurons": list(neurons)}


def deleted_blocks(fields: dict, heads: list[int] | None, neurons: list[int] | None) -> list[bool]:
    """Of each block, whether nothing of it is left; arguments as in `SlicedConfig`, None for all."""
    layers = range(fields["num_hidden_layers"])
    attention = [heads is not None and not heads[layer] for layer in layers]
    mlp = [neurons is not None and not neurons[layer] for layer in layers]
    if fields.get("parallel_blocks"):
        return [both[0] and both[1] for both in zip(attention, mlp, strict=True)]
    return [part for both in zip(attention, mlp, strict=True) for part in both]
