"""What a run of slicing came to, dense and sliced side by side: the lines that `slice`, `info` and the card share.

All of it is in the record (`slicing.json`): `size`, `asked`, `perplexity`, `tokens_per_second`.
"""

from __future__ import annotations

import math
from typing import Any

from slicegpt.modeling.sizes import describe_heads, describe_neurons, format_bytes
from slicegpt.recipe import Recipe

NOT_MEASURED = "not measured"


def asked_record(recipe: Recipe) -> dict[str, Any]:
    """The size that a recipe asks for, by its name; of widths there is nothing to compare."""
    return {} if recipe.size == "widths" else {recipe.size: getattr(recipe, recipe.size)}


def perplexity_record(check: dict | None) -> dict | None:
    """Perplexities on the held-out windows that `slicegpt.slicing.held_out.held_out_check` evaluated."""
    if check is None:
        return None
    found = {name: _perplexity(check[f"{name}_nll"]) for name in ("dense", "sliced")}
    return found | {"tokens": check["tokens"], "chose_ridge": check["chose_ridge"]}


def _perplexity(nll: float) -> float | None:
    return round(math.exp(nll), 4) if nll < 700 else None  # beyond a float: the model is broken


def asked_and_got(record: dict[str, Any]) -> str | None:
    """One line on the size that was asked for and the one that came out; None where widths were given."""
    asked = record.get("asked") or {}
    size = record.get("size", record)  # `info` counts it on the files
    if "keep" in asked:
        got = size["parameters"] / size["dense_parameters"]
        return f"asked {_percent(asked['keep'])} of the parameters, got {_percent(got)}"
    if "target_bytes" in asked:
        return f"asked {format_bytes(asked['target_bytes'])}, got {format_bytes(size['bytes'])}"
    if "target_speedup" in asked:
        speed = record.get("tokens_per_second") or {}
        got = "not measured"
        if speed.get("dense") and speed.get("sliced"):
            got = f"measured {speed['sliced'] / speed['dense']:.2f}"
        return f"asked {asked['target_speedup']:.2f} times the dense model's tokens/s, {got}"
    if "slice" in asked:
        return f"asked to delete {_percent(asked['slice'])} of the columns, deleted {_percent(record['slicing'])}"
    return None


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def outcome_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """`[{"", dense, sliced, change}]`: sizes, held-out perplexity and tokens/s."""
    size = record["size"]
    removed = f"{-100 * size['removed']:+.1f} %"
    rows = [
        _row("parameters", f"{size['dense_parameters']:,}", f"{size['parameters']:,}", removed),
        *_active_rows(size),
        _row(
            f"bytes, {record['dtype']}",
            format_bytes(size["dense_bytes"]),
            format_bytes(size["bytes"]),
            f"{100 * (size['bytes'] / size['dense_bytes'] - 1):+.1f} %",
        ),
        _row("perplexity, held out", *_pair(record.get("perplexity"))),
    ]
    speed = record.get("tokens_per_second")
    label = "tokens/s, runtime" if speed is None else f"tokens/s, {speed['device']}"
    return [*rows, _row(label, *_pair(speed))]


def shape_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """What was deleted of the network's shape, as `outcome_rows` has it."""
    boundaries = record["boundaries"]
    widths = summarise([boundary["width"] for boundary in boundaries])
    shortcuts = summarise([boundary["shortcut"] for boundary in boundaries[:-1]])
    neurons, whole = (describe_neurons(record[name]) for name in ("neurons", "dense_neurons"))
    unit = "an expert" if "experts" in record["size"] else "an MLP"
    stored = record.get("stored_as", record["dtype"])
    rows = [] if stored == record["dtype"] else [_row("stored as", record["dtype"], stored, "")]
    rows += [
        _row("columns", str(record["dense_width"]), widths, ""),
        _row(f"neurons of {unit}", whole, neurons, ""),
    ]
    for name in ("key/value heads", "query heads"):
        field = name.replace("/", "_").replace(" ", "_")
        heads, dense = (record.get(f"{which}{field}") for which in ("", "dense_"))
        if heads != dense:  # folders of older versions have neither
            rows.append(_row(name, str(dense), describe_heads(heads), ""))
    return [*rows, _row("shortcuts", "none", shortcuts, "")]


def notes(record: dict[str, Any]) -> list[str]:
    """What one has to know of the figures: what they were measured on, or why they were not."""
    found, measured = [], record.get("perplexity")
    if measured is None:
        found.append("perplexity: no held-out windows of the calibration text were evaluated")
    else:
        flattered = ", which chose the refit's λ as well" if measured["chose_ridge"] else ""
        found.append(f"perplexity: on {measured['tokens']:,} tokens of the calibration text{flattered}")
    if "finetuning" in record or record.get("finetuned"):
        found[-1] += "; before fine-tuning"
    speed = record.get("tokens_per_second")
    if speed is not None:
        threads = f", threads: {speed['threads']}" if "threads" in speed else ""
        note = f" ({speed['note']})" if speed.get("note") else ""
        found.append(f"tokens/s: of the runtime, one sequence, {record['dtype']}{threads}{note}")
    return found


def summarise(values: list) -> str:
    """Distinct values in the order they appear, with how often: "448 (60), 576 (1)"."""
    counts: dict = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _row(name: str, dense: str, sliced: str, change: str) -> dict[str, str]:
    return {"": name, "dense": dense, "sliced": sliced, "change": change}


def compared(found: dict[str, Any]) -> str:
    """Two figures in words: "16.83, dense 15.02 (x 1.12)"."""
    dense, sliced, ratio = _pair(found)
    return f"{sliced}, dense {dense}" + (f" ({ratio})" if ratio else "")


def _pair(found: dict[str, Any] | None) -> tuple[str, str, str]:
    """Two figures and their ratio, as text."""
    dense, sliced = (None, None) if found is None else (found["dense"], found["sliced"])
    shown = [NOT_MEASURED if value is None else f"{value:.4g}" for value in (dense, sliced)]
    ratio = f"x {sliced / dense:.2f}" if dense and sliced else ""
    return shown[0], shown[1], ratio


def _active_rows(size: dict[str, Any]) -> list[dict[str, str]]:
    if "experts" not in size:
        return []
    dense, active = size["dense_active_parameters"], size["active_parameters"]
    change = f"{100 * (active / dense - 1):+.1f} %"
    return [_row("parameters for a token", f"{dense:,}", f"{active:,}", change)]


def described_experts(facts: dict) -> list[tuple[str, str]]:
    """Lines on a mixture of experts, from the facts of `expert_record`; none where there is none."""
    if "experts" not in facts:
        return []
    active, dense = facts["active_parameters"], facts["dense_active_parameters"]
    return [
        ("experts", f"{facts['experts']} a layer, {facts['experts_per_token']} for a token"),
        ("parameters for a token", f"{active:,} of {dense:,} dense"),
    ]
