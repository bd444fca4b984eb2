"""The tables of every kind of result on the page: what is shown, and what is folded away."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from slicegpt.bench.harness.columns import rounded, table, tenths, yes_or_no
from slicegpt.bench.harness.display import operation_table, stage_table
from slicegpt.modeling.sizes import describe_neurons, format_bytes

# Longer tables are folded.
SHOWN_ROWS = 8


@dataclass(frozen=True)
class Table:
    """A table: text, numbers, or None where nothing was measured.

    Attributes:
        caption: what it holds; the page's entry for it where it is folded.
        folded: whether a reader must open it.
    """

    caption: str
    titles: Sequence[str]
    cells: Sequence[Sequence[object]]
    folded: bool = False


def of_kind(kind: str, rows: Sequence[Mapping], caption: str) -> list[Table]:
    """The rows under the kind's columns; no table where there are none."""
    return [Table(caption, *table(kind, rows), folded=len(rows) > SHOWN_ROWS)] if rows else []


def facts(caption: str, pairs: Sequence[tuple[str, object]]) -> Table:
    return Table(caption, ("", ""), [list(pair) for pair in pairs if pair[1] is not None])


def own_columns(caption: str, rows: Sequence[Mapping]) -> Table:
    """Rows under their own keys; lists and mappings are written in words."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [[in_words(row.get(title)) for title in titles] for row in rows]
    return Table(caption, titles, cells, folded=len(rows) > SHOWN_ROWS)


def in_words(value: object) -> object:
    """A cell's value: never the JSON of a list or a mapping."""
    if isinstance(value, bool):
        return yes_or_no(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items()) or None
    if isinstance(value, list | tuple):
        return ", ".join(str(in_words(each)) for each in value) or None
    return rounded(value) if isinstance(value, float) else value


def _rows(kind: str, name: str = "rows", caption: str = "") -> Callable[[Mapping], list[Table]]:
    def tables(content: Mapping) -> list[Table]:
        rows = content.get(name) or []
        return of_kind(kind, rows, caption or f"all {len(rows)} rows")

    return tables


def _token(content: Mapping) -> list[Table]:
    # Folded: the headlines say the same.
    ratios = [
        replace(one, folded=True) for one in of_kind("ratios", content.get("ratios") or [], "speed-ups")
    ]
    return [*_rows("token")(content), *ratios]


def _layers(content: Mapping) -> list[Table]:
    rows = content["rows"]
    operations = [Table("every operation", *operation_table(rows), folded=True)] if rows else []
    return [*of_kind("layers", rows, "layers"), *operations]


def _frontier(content: Mapping) -> list[Table]:
    points = content["points"]
    texts = list(points[0]["perplexity"])
    titles = ["method", "width, neurons", "parameters", "weights", "of the decoder", *texts]
    dense = next((point for point in points if point["method"] == "dense"), points[0])
    cells = [
        [
            point["method"],
            point["widths"],
            point["parameters"],
            format_bytes(point["bytes"]),
            tenths(point["decoder_parameters"] / dense["decoder_parameters"]),
            *(rounded(point["perplexity"][text]) for text in texts),
        ]
        for point in sorted(points, key=lambda point: (point["method"] != "dense", point["method"]))
    ]
    found = [Table(f"perplexity of {len(points)} points", titles, cells, folded=len(points) > SHOWN_ROWS)]
    for method, rows in (content.get("comparisons") or {}).items():
        named = [{**row, "method": method, "perplexity": row[method]} for row in rows]
        found += of_kind("comparison", named, f"{method} against the published method, {len(rows)} rows")
    return found


def _refit(content: Mapping) -> list[Table]:
    return [Table("seconds of every stage", *stage_table(content["rows"]))]


def _recovery(content: Mapping) -> list[Table]:
    training = content["training"]
    trained = [
        ("held-out loss", f"{training['loss_before']:.4g} before, {training['loss_after']:.4g} after"),
        ("steps", f"{training['steps']:,}, of which the {training['best_step']:,}th was kept"),
        ("tokens", training["tokens"]),
        ("trained parameters", training["trained_parameters"]),
        ("seconds", rounded(training["seconds"])),
    ]
    evaluation = content["evaluation"]
    data = f"perplexity on {evaluation['data']}, windows of {evaluation['seqlen']:,} tokens"
    sliced = [("sliced model", content.get("sliced"))]
    return [
        *of_kind("evaluation", evaluation["models"], data),
        facts("training", sliced + trained),
    ]


def _finetuning(content: Mapping) -> list[Table]:
    before, after = (math.exp(content[name]) for name in ("loss_before", "loss_after"))
    pairs = [
        ("held-out perplexity", f"{before:.4g} before, {after:.4g} after"),
        ("steps", f"{content['steps']:,}, of which the {content['best_step']:,}th was kept"),
        ("tokens", content["tokens"]),
        ("trained parameters", content["trained_parameters"]),
        ("seconds", rounded(content["seconds"])),
    ]
    return [facts("training", pairs)]


def _gram(content: Mapping) -> list[Table]:
    return [
        *of_kind("gram", content["gram"], f"all {len(content['gram'])} rows"),
        *of_kind("eigensolver", content.get("eigensolver") or [], "eigensolver"),
        *of_kind(
            "gram predictions",
            [
                {name: None if value == "not measured" else value for name, value in row.items()}
                for row in content.get("predictions") or ()
            ],
            "262,144 tokens of width 4096 in float16, predicted from the data sheets",
        ),
    ]


def over_unfused(rows: Sequence[Mapping]) -> dict[tuple[str, str], dict[int, float]]:
    """(model, dtype) -> rows of a call -> the fused operators' time over unfused torch's, median of the shapes."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"].startswith("fused"):
            found[row["model"], row["dtype"]][row["T"]].append(row["of unfused"])
    return {
        name: {T: statistics.median(values) for T, values in sorted(own.items())}
        for name, own in found.items()
    }


def _rotation(content: Mapping) -> list[Table]:
    medians = over_unfused(content["rows"])
    counts = sorted({T for own in medians.values() for T in own})
    cells = [
        [*name, *(rounded(own[T]) if T in own else None for T in counts)] for name, own in medians.items()
    ]
    titles = ["model", "dtype", *(f"{T} row{'s' if T > 1 else ''}" for T in counts)]
    summary = [Table("time over unfused torch, median of the shapes", titles, cells)] if cells else []
    return summary + of_kind("rotation", content["rows"], f"all {len(content['rows'])} rows")


def _published(content: Mapping) -> list[Table]:
    """Every list of rows, by the title under which it stands."""
    return [
        own_columns(name, value)
        for name, value in content.items()
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value)
    ]


def before_and_after(content: Mapping) -> list[tuple[str, float, float]]:
    """What the run of slicing measured of both models: (name, sliced, dense)."""
    names = {"perplexity": "perplexity", "tokens_per_second": "tokens/s"}
    pairs = {title: content.get(name) for name, title in names.items()}
    return [
        (title, pair["sliced"], pair["dense"])
        for title, pair in pairs.items()
        if isinstance(pair, Mapping) and pair.get("sliced") and pair.get("dense")
    ]


def _model(content: Mapping) -> list[Table]:
    boundaries, size = content["boundaries"], content.get("size") or content
    pairs = [
        ("parameters", f"{size['parameters']:,} of {size['dense_parameters']:,} dense"),
        (
            "weights",
            f"{format_bytes(size['bytes'])} of {format_bytes(size['dense_bytes'])} dense, {content['dtype']}",
        ),
        ("removed", f"{tenths(size['removed'])} of all parameters, shortcuts and head counted"),
        ("slicing (1 - d/D)", tenths(content["slicing"])),
        ("neurons of an MLP", f"{describe_neurons(content['neurons'])}, of {content['dense_neurons']:,}"),
    ]
    pairs += [(name, f"{sliced:.4g}, dense {dense:.4g}") for name, sliced, dense in before_and_after(content)]
    seen = content.get("calibration")
    if seen:
        pairs.append(("calibration", f"{seen['tokens']:,} tokens of {seen['source']}"))
    found = [facts("size", pairs)]
    found.append(own_columns("boundaries", [{"boundary": i} | each for i, each in enumerate(boundaries)]))
    if isinstance(content.get("seconds"), Mapping):
        found.append(
            facts("seconds of every stage", [(n, rounded(s)) for n, s in content["seconds"].items()])
        )
    return found


def _generation(content: Mapping) -> list[Table]:
    names = ("prompt", "text", "tokens", "tokens_per_second", "seconds", "runtime", "engine")
    return [facts("generation", [(name.replace("_", " "), in_words(content.get(name))) for name in names])]


def _conversation(content: Mapping) -> list[Table]:
    return [facts("messages", [(message["role"], message["content"]) for message in content["messages"]])]


def _environment(content: Mapping) -> list[Table]:
    found = []
    for name, value in content["facts"].items():
        if isinstance(value, Mapping):
            found.append(facts(name, [(key, in_words(each)) for key, each in value.items()]))
        elif isinstance(value, list) and value:
            found.append(own_columns(name, value))
    return found


def _demo(content: Mapping) -> list[Table]:
    sentences = list({row["model"]: row["text"] for row in content["rows"] if row.get("text")}.items())
    texts = [facts("continuations", sentences)] if sentences else []
    return [*of_kind("demo", content["rows"], "models"), *texts]


def _tuned(content: Mapping) -> list[Table]:
    rows = [
        row if "config" not in row else row | {"config": in_words(row["config"])} for row in content["rows"]
    ]
    return [own_columns(f"{len(rows)} shapes", rows)] if rows else []


def _plan(content: Mapping) -> list[Table]:
    places = [place for place, peak in content["peak"].items() if peak]
    parts = [
        {"part": part} | {place: format_bytes(own[place]) if own.get(place) else None for place in places}
        for part, own in content["parts"].items()
    ]
    size = content["size"]
    plan = [
        ("parameters", f"{size['parameters']:,} of {size['dense_parameters']:,} dense"),
        ("bytes", format_bytes(size["bytes"])),
        ("streams", f"on the {content['activation_storage']}"),
        *((f"peak, {place}", format_bytes(content["peak"][place])) for place in places),
        *((f"peak, {place}, during", content["peak_stage"][place]) for place in places),
    ]
    seconds = [(stage, rounded(value)) for stage, value in (content["seconds"] or {}).items()]
    times = [facts("seconds of every stage, an estimate", seconds)] if seconds else []
    return [facts("plan", plan), own_columns("largest size of every part", parts), *times]


def _memory(content: Mapping) -> list[Table]:
    named = [
        {name: format_bytes(value) if name.endswith("bytes") else value for name, value in row.items()}
        for row in content["rows"]
    ]
    return [
        facts(
            "a run, and its plan", [(name.replace("_", " "), in_words(value)) for name, value in row.items()]
        )
        for row in named
    ]


def _ranks(content: Mapping) -> list[Table]:
    return [own_columns("seconds", content["rows"])]


def _measured(content: Mapping) -> list[Table]:
    return [own_columns(f"all {len(content['rows'])} rows", content["rows"])]


def _kills(content: Mapping) -> list[Table]:
    names = ("seconds", "first_snapshot", "longest_gap")
    undisturbed = [(name.replace("_", " "), rounded(content[name])) for name in names]
    return [facts("the run that was left alone", undisturbed), own_columns("kills", content["kills"])]


TABLES: dict[str, Callable[[Mapping], list[Table]]] = {
    "token": _token,
    "throughput": _rows("throughput"),
    "layers": _layers,
    "slicing": _rows("slicing", caption="stages"),
    "plan": _plan,
    "memory": _memory,
    "ranks": _ranks,
    "resume_kills": _kills,
    "sizes": _rows("sizes"),
    "frontier": _frontier,
    "equal size": _rows("equal size"),
    "recovery": _recovery,
    "evaluation": _rows("evaluation"),
    "finetuning": _finetuning,
    "refit": _refit,
    "vllm": _rows("vllm", "models"),
    "speculative": _rows("speculative"),
    "gram": _gram,
    "rotation": _rotation,
    "decode attention": _rows("decode attention"),
    "predict": _rows("predict"),
    "published": _published,
    "ceilings": _measured,
    "overlap": _measured,
    "speedup": _measured,
    "planes": _measured,
    "expert refit": _measured,
    "rehearsal": _measured,
    "plans": _measured,
    "model": _model,
    "slicing record": _model,
    "generation": _generation,
    "conversation": _conversation,
    "environment": _environment,
    "demo": _demo,
    "tuned": _tuned,
    "kernels": _rows("kernel"),
}


# What a file of another version may lack, or hold in another form.
UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration)


def tables_of(content: Mapping) -> list[Table]:
    """A result's tables; of a kind or a form that is not known, every list of rows that it holds."""
    try:
        return TABLES.get(content["benchmark"], _published)(content)
    except UNREADABLE:
        return _published(content)
