"""A recipe: all choices of a slicing run in one value, which a TOML or YAML file holds and which repeats the run.

Nothing heavy is imported here: a wrong choice is found before torch is loaded.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from slicegpt.errors import SliceGPTError
from slicegpt.recipe_files import as_toml, as_yaml, checked_ending, read_choices
from slicegpt.recipe_rules import (
    AUTO,
    FLAG,
    FORMER_NAMES,
    POSITIVE,
    Rule,
    allocation,
    byte_count,
    choice,
    number,
    number_or_auto,
    one_of,
    present_names,
    step_times,
    takes_former_names,
    text,
    whole,
    whole_numbers,
    whole_or_auto,
    whole_or_list,
)

SIZES = ("keep", "slice", "target_bytes", "target_speedup", "widths")
FORMS = SLICED, STOCK, PER_LAYER = ("sliced", "stock", "per-layer")
SHORTCUT_MODES = ("compact", "dense")
ORIENTATIONS = ("aligned", "random", "pca")
SIGNALS = ("residual", "normalized")
QUANTIZE = ("int8", "int4")
# Columns of a weight that share a scale in 4 bits.
GROUP_SIZES = (32, 64, 128)
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
# How many neurons each layer keeps: by prices (`slicegpt.slicing.plans`), by the refit's objective, or all the same.
PRICES, OBJECTIVE, UNIFORM = ALLOCATIONS = ("prices", "objective", "uniform")

# The calibration of a run whose documents were handed over as such: no file can name them.
IN_MEMORY = "documents in memory"
# A recipe's name in the folder of the model that it made.
FILE_NAME = "recipe.toml"

_HEADER = (
    f"The choices that made this model: `slicegpt slice --recipe {FILE_NAME} --output DIR` repeats the run."
)


# --- the recipe ---------------------------------------------------------------------------------------------------


@takes_former_names
@dataclass(frozen=True)
class Recipe:
    """All choices of a slicing run; what belongs to the machine (device, output folder, shard size) is none of them.

    The same recipe gives the same safetensors, bit for bit, on the same machine with the same versions and number of
    threads.

    Attributes:
        model: what is sliced: `smollm2-135m`, a folder, a `.gguf` file or a hub id; None: given with the call.
        keep: fraction of all parameters to keep, in (0, 1]: the true size. At most one of the five sizes is given.
            Formerly `params`, which is still taken and can be read.
        slice: fraction of columns to delete, in [0, 1): the paper's percentage.
        target_bytes: bytes that the weights may take, a number or a text such as "400MB" (1e6) or "400MiB" (2**20).
        target_speedup: tokens/s while decoding, in those of the dense model, that slicing is to reach in the runtime on
            this machine: how long a step takes is measured, and columns, neurons and key/value groups are priced by it.
        widths: columns at every boundary, one whole number each.
        decode_batch: of `target_speedup`: sequences that are decoded at once; None is 1.
        step_times: of `target_speedup`: what was measured, see `slicegpt.step_times`, so that the recipe repeats; None:
            it is measured.
        form: "sliced", or "stock": a model of the dense model's own class, without shortcuts, one width, and one number
            of neurons in all layers (`slicegpt.conversion.stock`); or "per-layer": the same with a number of neurons
            for each layer, which of other engines llama.cpp runs (`slicegpt.checkpoint.gguf_export`).
        untie: give a model in the stock form, which keeps its width where the head is tied, a head of its own.
        round_to: widths and numbers of neurons are multiples of it; "auto": what the model's width and the device need
            (`slicegpt.conversion.multiples`).
        shortcut: "compact" or "dense"; None is compact where the orientation allows it.
        orientation: "aligned", "random" or "pca": the basis inside each subspace; compact shortcuts need aligned ones.
        slice_head: slice the last boundary, which the head reads, too.
        neurons: fraction of MLP neurons to delete, in [0, 1), or "auto": as many as the size asks for. None is auto
            where a true size is asked for (`keep`, `target_bytes`) and the refit is on, else 0.
        allocate: which layers give them up. "prices": as the logits' loss and the refit's objective say, with as many
            columns deleted beside them as pay; "objective": as the objective alone says, in step with the columns;
            "uniform": all the same, and no columns. True and False are former names of "objective" and "uniform".
        kv_groups: key/value groups of attention that every layer keeps, a key/value head with its query heads each, or
            a list with one number a layer; 0: a layer without attention. None: all.
        group_heads: query heads that each of these groups keeps, in every layer or as a list; None: all.
        signal: "residual" or "normalized": what the covariance is taken of.
        refit: fit every block's output weights to the dense model's stream.
        ridge: λ of the refit, above 0, relative to the mean diagonal; or "auto": by the loss on held-out windows.
        refit_share: share of the calibration samples that the refit fits to, in (0, 1].
        calibration: "auto" (`wikitext2` where the hub gives it, else `self`), or `DATA[:WEIGHT],...`: text files,
            folders, `.jsonl`, `.parquet`, `python-reference`, `wikitext2`, `ptb`, `c4`, `alpaca`,
            `self` (the model writes it), `random-tokens`.
        vocabulary_prior: the embedding's basis counts the whole vocabulary, this much beside the text.
        text_column: of files with columns; None is "text".
        nsamples: calibration samples.
        seqlen: tokens of a sample.
        batch_size: samples of a batch; sums are taken batch by batch, so it decides about last bits.
        seed: of the samples and of the random orientation.
        varied_seqlen: a sample is one document, padded; else a window of the joined text.
        quantize: "int8" (a scale a row) or "int4" (a scale for each group of columns): store the layers in so many
            bits, rounded block by block as they are sliced, with errors made up for (GPTQ). None: in `dtype`.
        group_size: of int4: 128, 64 or 32 columns at most share a scale; None is 64.
        zero_points: of int4: each group has one beside its scale.
        quantize_tables: embedding and head are stored in 8 bits, too, where `quantize` is given.
        dtype: of the weights: "float32", "float16", "bfloat16", "float64", or "auto" for the stored one.

    Raises:
        SliceGPTError: a choice of the wrong kind or out of range, or choices that contradict each other.

    Example:
        >>> recipe = Recipe(keep=0.9, calibration="train.txt")
        >>> recipe.override(slice=0.25).keep is None  # one size takes the place of the other
        True
    """

    model: str | None = choice("", None, Rule("text", text, optional=True))

    keep: float | None = choice(
        "size", None, Rule("a number", number, "lie in (0, 1]", lambda value: 0 < value <= 1, True)
    )
    slice: float | None = choice(
        "size", None, Rule("a number", number, "lie in [0, 1)", lambda value: 0 <= value < 1, True)
    )
    target_bytes: float | None = choice(
        "size",
        None,
        Rule(
            "a number of bytes such as 400e6 or 400MB",
            byte_count,
            "lie in [1, 1e18)",
            lambda value: 1 <= value < 1e18,
            True,
        ),
    )
    target_speedup: float | None = choice(
        "size",
        None,
        Rule("a number", number, "lie in [1, 100)", lambda value: 1 <= value < 100, True),
    )
    widths: tuple[int, ...] | None = choice(
        "size", None, Rule("a list of whole numbers", whole_numbers, "hold one at least", bool, True)
    )
    decode_batch: int | None = choice("size", None, replace(POSITIVE, optional=True))
    step_times: str | None = choice(
        "size", None, Rule("what a run with target_speedup wrote", step_times, optional=True)
    )

    form: str = choice("shape", SLICED, one_of(FORMS))
    untie: bool = choice("shape", False, FLAG)
    round_to: int | str = choice(
        "shape",
        AUTO,
        Rule(
            f"a whole number or {AUTO}",
            whole_or_auto,
            "be at least 1",
            lambda value: value == AUTO or value >= 1,
        ),
    )
    shortcut: str | None = choice("shape", None, one_of(SHORTCUT_MODES, optional=True))
    orientation: str = choice("shape", "aligned", one_of(ORIENTATIONS))
    slice_head: bool = choice("shape", False, FLAG)
    neurons: float | str | None = choice(
        "shape",
        None,
        Rule(
            f"a number or {AUTO}",
            number_or_auto,
            f"lie in [0, 1) or be {AUTO}",
            lambda value: value == AUTO or 0 <= value < 1,
            True,
        ),
    )
    allocate: str = choice(
        "shape",
        PRICES,
        Rule(
            f"one of {', '.join(ALLOCATIONS)}",
            allocation,
            f"be one of {', '.join(ALLOCATIONS)}",
            lambda value: value in ALLOCATIONS,
        ),
    )
    kv_groups: int | tuple[int, ...] | None = choice(
        "shape",
        None,
        Rule(
            "a whole number or a list of them",
            whole_or_list,
            "be at least 0, and above 0 in one layer",
            lambda value: value > 0 if isinstance(value, int) else min(value, default=-1) >= 0 < max(value),
            True,
        ),
    )
    group_heads: int | tuple[int, ...] | None = choice(
        "shape",
        None,
        Rule(
            "a whole number or a list of them",
            whole_or_list,
            "be at least 1",
            lambda value: (value if isinstance(value, int) else min(value, default=0)) >= 1,
            True,
        ),
    )
    signal: str = choice("shape", "residual", one_of(SIGNALS))

    refit: bool = choice("output refit", True, FLAG)
    ridge: float | str = choice(
        "output refit",
        AUTO,
        Rule(
            f"a number or {AUTO}",
            number_or_auto,
            f"be above 0 or {AUTO}",
            lambda value: value == AUTO or 0 < value < math.inf,
        ),
    )
    refit_share: float = choice(
        "output refit", 1.0, Rule("a number", number, "lie in (0, 1]", lambda value: 0 < value <= 1)
    )

    calibration: str = choice("calibration", AUTO, Rule("text", text, "name a text", bool))
    vocabulary_prior: float = choice(
        "calibration", 0.0, Rule("a number", number, "be at least 0", lambda value: 0 <= value < math.inf)
    )
    text_column: str | None = choice("calibration", None, Rule("text", text, optional=True))
    nsamples: int = choice("calibration", 128, POSITIVE)
    seqlen: int = choice("calibration", 2048, POSITIVE)
    batch_size: int = choice("calibration", 8, POSITIVE)
    seed: int = choice(
        "calibration",
        42,
        Rule("a whole number", whole, "lie in [-2^63, 2^63)", lambda value: -(1 << 63) <= value < 1 << 63),
    )
    varied_seqlen: bool = choice("calibration", False, FLAG)

    quantize: str | None = choice("weights", None, one_of(QUANTIZE, optional=True))
    group_size: int | None = choice(
        "weights",
        None,
        Rule(
            "a whole number",
            whole,
            f"be one of {', '.join(map(str, GROUP_SIZES))}",
            lambda value: value in GROUP_SIZES,
            True,
        ),
    )
    zero_points: bool = choice("weights", False, FLAG)
    quantize_tables: bool = choice("weights", True, FLAG)
    dtype: str = choice("weights", AUTO, one_of(DTYPES))

    def __post_init__(self):
        for own in fields(self):
            value = own.metadata["rule"].check(own.name, getattr(self, own.name))
            object.__setattr__(self, own.name, value)
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise SliceGPTError(f"only one size can be asked for, got {' and '.join(given)}", "size")
        if self.shortcut == "compact" and self.orientation != "aligned":
            raise SliceGPTError(
                f"compact shortcuts need 'aligned' bases, got {self.orientation!r}; dense ones take it",
                "orientation",
            )
        if not self.refit:
            self._check_without_refit()
        if self.quantize != "int4":
            for name, given in (("group_size", self.group_size), ("zero_points", self.zero_points or None)):
                if given is not None:
                    raise SliceGPTError(f"is of int4, got {given} with quantize {self.quantize}", name)
        if self.quantize is None and not self.quantize_tables:
            raise SliceGPTError(
                "false leaves out what only quantize would store in 8 bits", "quantize_tables"
            )
        if self.target_speedup is None:
            for name in ("decode_batch", "step_times"):
                if (given := getattr(self, name)) is not None:
                    raise SliceGPTError(f"is of target_speedup, got {given!r} without it", name)
        else:
            self._check_speedup()
        if self.form != SLICED:
            self._check_stock()
        elif self.untie:
            raise SliceGPTError(f"is for the stock form, got True with form {self.form!r}", "untie")

    def _check_stock(self) -> None:
        if self.quantize is not None:
            raise SliceGPTError(
                f"is for the form {SLICED!r}, got {self.quantize} with {self.form!r}", "quantize"
            )
        if self.shortcut is not None:
            raise SliceGPTError(f"the {self.form} form has none, got {self.shortcut!r}", "shortcut")
        for name in ("kv_groups", "group_heads"):
            kept = getattr(self, name)
            if self.form == STOCK and isinstance(kept, tuple) and len(set(kept)) > 1:
                raise SliceGPTError(f"the stock form has one number for all layers, got {kept}", name)
        if self.widths is not None:
            raise SliceGPTError(
                f"the {self.form} form has one width, got a list; ask for keep, target_bytes or slice",
                "widths",
            )

    def _check_speedup(self) -> None:
        if self.form != SLICED:
            raise SliceGPTError(
                f"is of the form {SLICED!r}, which the runtime was timed in, got {self.form!r}",
                "target_speedup",
            )
        if self.quantize is not None:
            raise SliceGPTError(
                f"is timed with the weights in their dtype, got quantize {self.quantize!r}", "target_speedup"
            )

    def _check_without_refit(self) -> None:
        if self.neurons not in (None, 0):
            raise SliceGPTError(
                f"which of them to delete is decided by the refit, got {self.neurons} without it", "neurons"
            )
        for name in ("kv_groups", "group_heads"):
            if (kept := getattr(self, name)) is not None:
                raise SliceGPTError(
                    f"which of them to delete is decided by the refit, got {kept} without it", name
                )
        if self.ridge != AUTO:
            raise SliceGPTError(f"needs the output refit, got {self.ridge:g} without it", "ridge")
        if self.quantize is not None:
            raise SliceGPTError(f"needs the output refit, got {self.quantize} without it", "quantize")
        if self.refit_share != 1:
            raise SliceGPTError(f"needs the output refit, got {self.refit_share:g} without it", "refit_share")

    # --- choices made from others ---

    @property
    def size(self) -> str:
        """The name of the size that is asked for.

        Raises:
            SliceGPTError: none is.
        """
        name = next((name for name in SIZES if getattr(self, name) is not None), None)
        if name is None:
            raise SliceGPTError(f"one of {', '.join(SIZES)} is needed, got none", "size")
        return name

    def override(self, **choices: Any) -> Recipe:
        """Return the recipe with other choices; a size takes the place of whatever size there was.

        Raises:
            SliceGPTError: a name that is no choice, and as the class does.
        """
        choices = present_names(choices)
        for name in choices:
            if name not in NAMES:
                near = difflib.get_close_matches(name, (*NAMES, *FORMER_NAMES), n=1)
                hint = (
                    f"did you mean {FORMER_NAMES.get(near[0], near[0])}?"
                    if near
                    else f"the choices are {', '.join(NAMES)}"
                )
                raise SliceGPTError(f"is no choice of a recipe, got {choices[name]!r}; {hint}", name)
        if any(choices.get(name) is not None for name in SIZES):
            of_speedup = () if choices.get("target_speedup") is not None else ("decode_batch", "step_times")
            choices = dict.fromkeys((*SIZES, *of_speedup)) | choices
        if choices.get("decode_batch", self.decode_batch) != self.decode_batch:
            choices.setdefault("step_times", None)  # they were those of another batch
        return replace(self, **choices)

    def resolved(self) -> Recipe:
        """Return the recipe with the choices filled in that follow from others, so that no default can change them."""
        shortcut, neurons = self.shortcut, self.neurons
        if shortcut is None and self.form == SLICED:
            shortcut = "compact" if self.orientation == "aligned" else "dense"
        if neurons is None:
            # The paper's percentage is of columns alone; a true size is best reached both ways.
            sizes = (self.keep, self.target_bytes, self.target_speedup)
            true_size = any(size is not None for size in sizes)
            neurons = AUTO if true_size and self.refit else 0.0
        allocate = self.allocate
        if self.form == STOCK:  # its layers are alike
            allocate = UNIFORM
        elif self.form != SLICED and allocate == PRICES:  # it has all heads, and widths of its own
            allocate = OBJECTIVE
        return replace(self, shortcut=shortcut, neurons=neurons, allocate=allocate)

    # --- files ---

    def choices(self) -> dict[str, Any]:
        """The choices that are made, by name, as plain values; those that are None are left out."""
        values = {name: getattr(self, name) for name in NAMES}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a `.toml`, `.yaml` or `.yml` file, or from the folder of a sliced model.

        Raises:
            SliceGPTError: one line naming the file, and the key at fault, its value and what was expected.
        """
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        content = read_choices(file)
        try:
            return cls().override(**content)
        except SliceGPTError as error:
            raise SliceGPTError(f"{file}: {error}", "recipe") from error

    def write(self, path: str | Path) -> None:
        """Write the choices that are made into a `.toml`, `.yaml` or `.yml` file.

        Raises:
            SliceGPTError: another ending, or a file that cannot be written.
        """
        file = checked_ending(path)
        text = self.to_toml() if file.suffix.lower() == ".toml" else self.to_yaml()
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SliceGPTError(f"cannot write {file}: {error.strerror}", "recipe") from error

    def to_toml(self) -> str:
        """The recipe as TOML: one line a choice, with a blank line between groups."""
        return as_toml(_HEADER, self.choices(), {own.name: own.metadata["group"] for own in fields(self)})

    def to_yaml(self) -> str:
        """The recipe as YAML, one line a choice."""
        return as_yaml(_HEADER, self.choices())


NAMES = tuple(own.name for own in fields(Recipe))
