"""Results on the terminal: a run's tables, and the notes below them."""

from collections.abc import Mapping, Sequence

from slicegpt.bench.harness.columns import SECONDARY, rounded, table
from slicegpt.bench.harness.titles import threads_of
from slicegpt.modeling.sizes import format_bytes
from slicegpt.table import fit_text, format_table

# A batch's growth of memory in use is reported above this; an allocator's reserve stays below.
LEAK_BYTES = 64e6


def operation_table(rows: Sequence[Mapping]) -> tuple[list[str], list[list[object]]]:
    """Milliseconds of every operation of a layer, one column for each variant."""
    rows = [row for row in rows if row["operations"]]
    names = list(dict.fromkeys(name for row in rows for name in row["operations"]))
    cells = [
        [name, *(rounded(row["operations"][name]) if name in row["operations"] else None for row in rows)]
        for name in names
    ]
    sums = ["sum", *(rounded(row["total_ms"]) for row in rows)]
    return ["ms", *(row["variant"] for row in rows)], [*cells, sums]


def stage_table(rows: Sequence[Mapping]) -> tuple[list[str], list[list[object]]]:
    """Seconds of every stage of slicing, one column for each run; a row is a run, with its name under "slicing"."""
    stages = [name for name in dict.fromkeys(name for row in rows[::-1] for name in row) if name != "slicing"]
    seconds = [[name, *(None if name not in row else rounded(row[name]) for row in rows)] for name in stages]
    return ["seconds", *(row["slicing"] for row in rows)], seconds


def print_table(titles: Sequence[str], cells: Sequence[Sequence], secondary: Sequence[str] = ()) -> None:
    rows = [dict(zip(titles, row, strict=True)) for row in cells]
    print(format_table(rows, titles, secondary=secondary))


def print_rows(kind: str, rows: Sequence[Mapping]) -> None:
    """Print the table of a kind of result, without what the terminal has no room for."""
    print_table(*table(kind, rows), SECONDARY.get(kind, ()))


def skipped_line(row: Mapping) -> str:
    """One line: what was not measured, or only in part, and why."""
    what = "measured in part" if row.get("partial") else "not measured"
    return f"{row['network']}, {row['engine']}: {what} ({row['skipped']})"


def stop_lines(rows: Sequence[Mapping]) -> list[str]:
    """What ended the search for the best batch, or kept a rate from being measured, one line a row: in the table it
    would take the room of two columns."""
    return [
        f"{', '.join(row[name] for name in ('ceiling', 'network', 'engine') if name in row)}: {row['reason']}"
        for row in rows
        if row.get("reason")
    ]


def print_skipped(skipped: Sequence[Mapping]) -> None:
    for row in skipped:
        print(fit_text(skipped_line(row)))


def print_summary(content: Mapping) -> None:
    """Print a run's tables, what was not measured, and the notes."""
    rows = content["rows"]
    if content["benchmark"] == "layers":
        print_table(*operation_table(rows))
        print()
    print_rows(content["benchmark"], rows)
    for line in stop_lines(rows):
        print(fit_text(line))
    print_skipped(content.get("skipped", ()))
    if content.get("ratios"):
        print()
        print_rows("ratios", content["ratios"])
    for note in notes(content):
        print(fit_text(note))


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
    if content.get("ratio") and "added_bytes" in content:
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
    if not content.get("complete", True):
        told.append("This run is incomplete.")
    return told
