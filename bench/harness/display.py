"""Rows of results as tables for people: the columns, their titles and units; and the notes below a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from slicegpt.modeling.sizes import format_bytes
from slicegpt.table import format_table

# A batch's growth of memory in use is reported above this; an allocator's reserve stays below.
LEAK_BYTES = 64e6

TITLES = {
    "token": "Time per token",
    "throughput": "Throughput",
    "layers": "One transformer layer",
    "slicing": "Cost of slicing",
    "predict": "Prediction",
    "demo": "Demo",
    "published": "Published figures, predicted",
    "gram": "Covariance (gram_)",
}


def title_of(content: Mapping) -> str:
    """The benchmark and what it was run on."""
    settings = content.get("settings", {})
    name = TITLES.get(content["benchmark"], content["benchmark"])
    if content["benchmark"] == "published":
        return name  # its settings are those of another prediction
    models = settings.get("model") or []
    models = [Path(name).name for name in ([models] if isinstance(models, str) else models)]
    subject = settings.get("shape") or ", ".join(models)
    return f"{name}: {subject}" if subject else name


def threads_of(environment: Mapping) -> str:
    count = environment["threads"]
    return f"{count} thread{'s' if count > 1 else ''}"


def _percent(value: float) -> str:
    return f"{round(100 * value)} %"  # -0 is 0


def _tenths(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"{value:.2f} x"


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _as_it_is(value: object) -> object:
    return value


# (key of a row, title, formatter).
COLUMNS = {
    "token": (
        ("network", "network", str),
        ("engine", "engine", str),
        ("ms_median", "ms per token", _round),
        ("speedup", "speed-up", _times),
        ("ms_p10", "p10", _round),
        ("ms_p90", "p90", _round),
        ("gpu_ms", "GPU-ms", _round),
        ("tokens_per_second", "tokens/s", _round),
        ("bytes", "weights", format_bytes),
        ("gigabytes_per_second", "GB/s", _round),
        ("bandwidth_fraction", "of bandwidth", _percent),
        ("peak_bytes", "peak memory", format_bytes),
        ("prompt_ms", "prompt ms", _round),
    ),
    "demo": (
        ("model", "model", str),
        ("engine", "runs in", str),
        ("bytes", "weights", format_bytes),
        ("perplexity", "perplexity", _round),
        ("tokens_per_second", "tokens/s", _round),
        ("speedup", "speed-up", _times),
    ),
    "throughput": (
        ("network", "network", str),
        ("engine", "engine", str),
        ("tokens_per_second", "tokens/s", _round),
        ("speedup", "speed-up", _times),
        ("batch", "at batch", int),
        ("bytes", "weights", format_bytes),
        ("peak_bytes", "memory there", format_bytes),
        ("largest_batch", "largest batch", int),
        ("reason", "stopped by", str),
    ),
    "layers": (
        ("variant", "layer", str),
        ("total_ms", "sum ms", _round),
        ("layer_ms", "whole layer ms", _round),
        ("difference", "difference", _percent),
        ("shortcut_ms", "of which shortcuts", _round),
        ("speedup", "speed-up", _times),
    ),
    "ratios": (
        ("comparison", "speed-up of", str),
        ("dtype", "dtype", str),
        ("ratio", "measured", _times),
        ("bytes_ratio", "bytes allow", _times),
    ),
    "agreement": (
        ("result", "result", str),
        ("ratio of", "ratio of", str),
        ("first", "first", _times),
        ("second", "second", _times),
        ("apart", "apart", _tenths),
    ),
    "slicing": (
        ("stage", "stage", str),
        ("seconds", "seconds", _round),
        ("of_dense_pass", "of a dense pass", _round),
    ),
    "predict": tuple(
        (name, name, _as_it_is)
        for name in (
            "model",
            "slice",
            "width",
            "GB",
            "GPUs",
            "fits",
            "ms per token",
            "GPU-ms per token",
            "largest batch",
            "tokens/s",
        )
    ),
}


def table(benchmark: str, rows: Sequence[Mapping]) -> tuple[list[str], list[list[object]]]:
    """Titles, and the cells of every row: text, numbers, or None where nothing was measured.

    Columns without any value are omitted.
    """
    columns = [column for column in COLUMNS[benchmark] if any(row.get(column[0]) is not None for row in rows)]
    cells = [
        [None if row.get(key) is None else written(row[key]) for key, _, written in columns] for row in rows
    ]
    return [title for _, title, _ in columns], cells


def operation_table(rows: Sequence[Mapping]) -> tuple[list[str], list[list[object]]]:
    """Milliseconds of every operation of a layer, one column for each variant."""
    rows = [row for row in rows if row["operations"]]
    names = list(dict.fromkeys(name for row in rows for name in row["operations"]))
    cells = [
        [name, *(_round(row["operations"][name]) if name in row["operations"] else None for row in rows)]
        for name in names
    ]
    sums = ["sum", *(_round(row["total_ms"]) for row in rows)]
    return ["ms", *(row["variant"] for row in rows)], [*cells, sums]


def print_table(titles: Sequence[str], cells: Sequence[Sequence]) -> None:
    print(format_table([dict(zip(titles, row, strict=True)) for row in cells], titles))


def print_rows(benchmark: str, rows: Sequence[Mapping]) -> None:
    """Print the table."""
    print_table(*table(benchmark, rows))


def skipped_line(row: Mapping) -> str:
    """One line: what was not measured, or only in part, and why."""
    what = "measured in part" if row.get("partial") else "not measured"
    return f"{row['network']}, {row['engine']}: {what} ({row['skipped']})"


def print_skipped(skipped: Sequence[Mapping]) -> None:
    for row in skipped:
        print(skipped_line(row))


def print_summary(content: Mapping) -> None:
    """Print a run's tables, what was not measured, and the notes."""
    if content["benchmark"] == "layers":
        print_table(*operation_table(content["rows"]))
        print()
    print_rows(content["benchmark"], content["rows"])
    print_skipped(content.get("skipped", ()))
    if content.get("ratios"):
        print()
        print_rows("ratios", content["ratios"])
    for note in notes(content):
        print(note)


def token_notes(rows: Sequence[Mapping]) -> list[str]:
    """Whether the engines of a network generated the same tokens, where the run compared them."""
    compared = [row for row in rows if row.get("same_tokens") is not None]
    if not compared:
        return []
    apart = [row for row in compared if row["same_tokens"] < row["tokens"]]
    if not apart:
        return ["All engines of a network with the same weights chose the same tokens."]
    which = ", ".join(f"{row['network']} {row['engine']} after {row['same_tokens']}" for row in apart)
    return [
        "Engines with the same weights chose other tokens than the network's first engine, as rounding may decide "
        f"between two that are as likely: {which}."
    ]


def notes(content: Mapping) -> list[str]:
    """What a reader must know besides the table: baseline, leaks, caches, load, completeness."""
    told = [content["baseline"]] if content.get("baseline") else []
    told += content.get("notes", [])
    told += token_notes(content["rows"])
    leaks = [row for row in content["rows"] if (row.get("leaked_bytes") or 0) > LEAK_BYTES]
    if leaks:
        which = ", ".join(
            f"{row['network']} {row['engine']} {format_bytes(row['leaked_bytes'])}" for row in leaks
        )
        told.append(f"Memory that a batch did not give back, above {format_bytes(LEAK_BYTES)}: {which}.")
    if content.get("taken_in_turns") is False:
        told.append("The networks do not fit into memory together: they were measured one after the other.")
    if content.get("ratio"):
        told.append(
            f"{content['tokens']:,} tokens, width {content['width']}: slicing takes {content['ratio']:.2f} times one "
            f"dense forward pass ({content['tokens_per_second']:,.0f} tokens/s) and at most "
            f"{format_bytes(content['added_bytes'])} above what was in use before."
        )
    libraries = dict.fromkeys(row["library"] for row in content["rows"] if row.get("library"))
    if libraries:
        told.append(f"2:4 sparse products by {', '.join(libraries)}.")
    if content.get("cache_note"):
        told.append(content["cache_note"])
    apart = [row["variant"] for row in content["rows"] if row.get("agrees") is False]
    sums = [abs(row["difference"]) for row in content["rows"] if row.get("difference") is not None]
    if sums:
        told.append(f"The operations add up to the whole layers within {max(sums):.1%}.")
    if apart:
        told.append(f"Apart by more than 10 %: {', '.join(apart)}.")
    load, threads = content["environment"].get("load_average"), content["environment"]["threads"]
    if load is not None and load > threads + 0.5:
        told.append(
            f"Other work was running (load average {load} at the start, {threads_of(content['environment'])} measured)."
        )
    if not content["complete"]:
        told.append("This run is incomplete.")
    return told
