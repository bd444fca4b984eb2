"""The methods that the frontier compares: each is a recipe, but for size and calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.size_plan import choices_for_parameters
from slicegpt.conversion.stock_plan import with_own_head
from slicegpt.errors import SliceGPTError, renamed
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import decoder_parameters, stored_parameters
from slicegpt.recipe import AUTO, OBJECTIVE, PER_LAYER, STOCK, UNIFORM, Recipe

BASES = {"total": stored_parameters, "decoder": decoder_parameters}


@dataclass(frozen=True)
class Method:
    """A way to slice.

    Attributes:
        title: for tables and plots.
        choices: of the recipe, in place of the caller's.
        untied: the head is stored apart from the embedding table, both sliced.
        full_width: no columns are deleted.
    """

    title: str
    choices: dict[str, Any] = field(default_factory=dict)
    untied: bool = False
    full_width: bool = False

    def recipe(self, shared: Recipe | None = None) -> Recipe:
        """The method's recipe: the caller's choices, and its own in their place."""
        return (shared or Recipe()).override(**self.choices)

    @property
    def round_to(self) -> int | None:
        """Its own multiple for widths; None takes the caller's."""
        return self.choices.get("round_to")


# What the published code (microsoft/TransformerCompression) stores: dense shortcuts after every block, a head that
# is untied even where the model's is tied and stays D wide, widths in multiples of 8, random final orientation. Its
# covariance is that of the stream before the norm, as here. Left out is what only harms it: it subtracts the mean
# from the embeddings of RMSNorm models, too, which changes their function.
METHODS = {
    "ours": Method("ours", {"neurons": AUTO}),
    "neurons": Method("ours, neurons alone", {"neurons": AUTO, "allocate": OBJECTIVE}, full_width=True),
    "in-step": Method("ours, columns and neurons in step", {"neurons": AUTO, "allocate": OBJECTIVE}),
    "equal": Method("ours, equal layers", {"neurons": AUTO, "allocate": UNIFORM}),
    "stock": Method("stock form", {"neurons": AUTO, "form": STOCK}),
    "per-layer": Method("stock form, layers differ", {"neurons": AUTO, "form": PER_LAYER}),
    "stock-untied": Method(
        "stock form, untied", {"neurons": AUTO, "form": STOCK, "untie": True}, untied=True
    ),
    "columns": Method("ours, columns alone", {"neurons": 0.0}),
    "compact": Method("compact shortcuts only", {"neurons": 0.0, "refit": False}),
    "published": Method(
        "published SliceGPT",
        {
            "neurons": 0.0,
            "refit": False,
            "shortcut": "dense",
            "orientation": "random",
            "round_to": 8,
        },
        untied=True,
    ),
}


def plan_point(method: Method, fields: dict, size: float, basis: str, round_to: int) -> list[SlicedConfig]:
    """The models of a method that store at most `size` of the dense model's elements, the widest first; it slices the
    best of them.

    Args:
        size: a fraction of all parameters ("total"), or of the decoder layers' weights ("decoder").
        round_to: widths are multiples of it, where the method does not bring its own.
    """
    if not 0 < size <= 1:
        raise SliceGPTError(f"must lie in (0, 1], got {size}", "size")
    dense = plan(fields, constant_widths(fields, fields["dense_hidden_size"]))
    count = BASES[basis]
    whole = fields["source_parameters"] if basis == "total" else count(dense)
    recipe = method.recipe(Recipe(round_to=round_to))
    shape, allocate = Shape.of(recipe), UNIFORM if method.full_width else recipe.allocate
    fields = with_own_head(fields) if method.untied and fields["tie_word_embeddings"] else fields
    with renamed(target="size"):
        return choices_for_parameters(fields, round(size * whole), shape, allocate, count)


def describe_widths(config: SlicedConfig) -> str:
    """Widths run by run: "504" where all but the last are the same, else "448 x 12, 512 x 49"; and neurons cut."""
    runs = [(width, len(list(same))) for width, same in groupby(config.boundary_widths[:-1])]
    widths = str(runs[0][0]) if len(runs) == 1 else ", ".join(f"{width} x {count}" for width, count in runs)
    if config.neurons == config.dense_neurons:
        return widths
    neurons = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    return f"{widths}; {neurons} neurons"
