"""Plots of times and rates: decoding, throughput, a layer, slicing, single operators."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from slicegpt.bench.harness.comparison import models_of
from slicegpt.bench.report.bars import COLOURS, ENGINE_COLOURS, GREY, INK, NARROW, Bar, BarChart, Group
from slicegpt.bench.report.tables import over_unfused

MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")

# An operation has the same colour in every plot; a fused one has the colour of its largest part, hatched.
OPERATIONS = {
    "norm": "#999999",
    "q": "#0072B2",
    "k": "#4E9ACB",
    "v": "#94C1E2",
    "attention": "#E69F00",
    "out": "#56B4E9",
    "shortcut": "#D55E00",
    "gate": "#00664B",
    "up": "#009E73",
    "activation": "#CC79A7",
    "down": "#7CC9B1",
}


def coloured(names: Iterable[str]) -> dict[str, str]:
    """Colours by order of appearance."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(dict.fromkeys(names))}


def token_bars(content: Mapping) -> BarChart:
    """Tokens/s of every engine, one group a network; dashed: the dense runtime's, times what bytes allow."""
    rows = [row for row in content.get("rows", ()) if row.get("tokens_per_second")]
    fused = [row for row in rows if row["engine"] == "fused" and row.get("read_bytes")]
    allowed = {}
    for own in models_of(row for row in fused if "dense_parameters" in row):
        dense = next((row for row in own if row["slice"] == 0), None)
        for row in own if dense else ():
            if row is not dense:
                ratio = dense["read_bytes"] / row["read_bytes"]
                allowed[row["network"]] = dense["tokens_per_second"] * ratio
    groups = []
    for network in dict.fromkeys(row["network"] for row in rows):
        bars = []
        for row in (row for row in rows if row["network"] == network):
            rate = 1000 * row["batch"]
            span = (rate / row["ms_p90"], rate / row["ms_p10"]) if row.get("ms_p10") else None
            colour = ENGINE_COLOURS.get(row["engine"], GREY)
            bars.append(Bar(row["engine"], row["tokens_per_second"], colour, span))
        groups.append(Group(network, bars, allowed.get(network)))
    batch = rows[0]["batch"] if rows else 1
    unit = f"tokens/s, batch {batch} (thin line: 10th to 90th percentile)"
    return BarChart(unit, groups, "dense runtime × what the bytes allow")


def predict_bars(content: Mapping) -> BarChart:
    rows = [row for row in content.get("rows", ()) if row.get("ms per token")]
    bars = [Bar(f"{100 * row['slice']:g} % sliced", row["ms per token"]) for row in rows]
    return BarChart("ms per token, predicted", [Group("", bars)])


def published_bars(content: Mapping) -> BarChart:
    """The error of every row that has one, without its sign."""
    groups = []
    for index, (title, rows) in enumerate(content.items()):
        if isinstance(rows, list):
            own = [row for row in rows if isinstance(row, Mapping) and row.get("error %") is not None]
            bars = [Bar(_row_name(row), abs(row["error %"]), COLOURS[index % len(COLOURS)]) for row in own]
            groups += [Group(title, bars)] if bars else []
    return BarChart("predicted, % off the published figure", groups)


def _row_name(row: Mapping) -> str:
    size = row.get("layer") or (f"{100 * row['slice']:g} %" if row.get("slice") else "dense")
    return f"{row['model']} {size}" + (f", {row['device']}" if "device" in row else "")


def vllm_bars(content: Mapping) -> BarChart:
    groups = []
    for name, title in (("tokens_per_second", "in all"), ("decode_tokens_per_second", "decoding")):
        rows = content.get("models", ())
        colours = coloured(row["model"] for row in rows)
        groups.append(Group(title, [Bar(row["model"], row[name], colours[row["model"]]) for row in rows]))
    return BarChart("tokens/s", groups)


def speculative_bars(content: Mapping) -> BarChart:
    rows = content.get("rows", ())
    colours = coloured(row["draft"] for row in rows)
    return BarChart(
        "tokens/s", [Group("", [Bar(r["draft"], r["tokens/s"], colours[r["draft"]]) for r in rows])]
    )


def grouped_bars(rows: Sequence[Mapping], name: str, value: str, title: Callable[[Mapping], str]) -> BarChart:
    """A group for each title, in it a bar of `value` for each row; what bears the same `name` has the same colour."""
    colours = coloured(row[name] for row in rows)
    groups = defaultdict(list)
    for row in rows:
        groups[title(row)].append(Bar(row[name], row[value], colours[row[name]]))
    return BarChart(value, [Group(*pair) for pair in groups.items()])


def gram_bars(content: Mapping) -> BarChart:
    def title(row: Mapping) -> str:
        return f"{row['N']:,} × {row['D']:,}, {row['X']}"

    return grouped_bars(content.get("gram", ()), "method", "ms", title)


def attention_bars(content: Mapping) -> BarChart:
    def title(row: Mapping) -> str:
        return f"{row['model']}, batch {row['batch']}, {row['tokens']:,} tokens"

    return grouped_bars(content.get("rows", ()), "by", "µs a layer", title)


def kernel_bars(content: Mapping) -> BarChart:
    bars = [Bar(row["name"], row["median"]) for row in content.get("rows", ())]
    return BarChart("ms, median", [Group("", bars)])


def refit_bars(content: Mapping) -> BarChart:
    rows = content.get("rows", ())
    stages = dict.fromkeys(name for row in rows[::-1] for name in row if name != "slicing")
    colours = coloured(row["slicing"] for row in rows)
    groups = [
        Group(
            stage, [Bar(row["slicing"], row[stage], colours[row["slicing"]]) for row in rows if stage in row]
        )
        for stage in stages
    ]
    return BarChart("seconds", groups)


def slicing_bars(content: Mapping) -> BarChart:
    """Seconds of every stage of slicing, and of one dense forward pass."""
    bars = [
        Bar(row["stage"], row["seconds"], GREY if "dense" in row["stage"] else COLOURS[0])
        for row in content.get("rows", ())
    ]
    return BarChart("seconds (grey: a dense forward pass over the same tokens)", [Group("", bars)])


def draw_throughput(content: Mapping, figure) -> None:
    """Tokens/s over the batch: colours are engines, lines are networks; the fastest measurement has a ring."""
    axis = figure.add_subplot()
    points = content["points"]
    networks = list(dict.fromkeys(point["network"] for point in points))
    best = {(row["network"], row["engine"]): row for row in content["rows"] if row.get("batch")}
    for network, engine in dict.fromkeys((point["network"], point["engine"]) for point in points):
        line: dict[int, float] = {}
        for point in points:
            if (point["network"], point["engine"]) == (network, engine):
                line[point["batch"]] = max(line.get(point["batch"], 0), point["tokens_per_second"])
        index = networks.index(network)
        colour = ENGINE_COLOURS.get(engine, GREY)
        batches = sorted(line)
        axis.plot(
            batches,
            [line[b] for b in batches],
            label=f"{network}, {engine}",
            color=colour,
            linestyle=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.5,
        )
        row = best.get((network, engine))
        if row:
            ring = {"markersize": 12, "markerfacecolor": "none", "color": colour}
            axis.plot(row["batch"], row["tokens_per_second"], "o", **ring)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch (ring: the fastest measurement)")
    axis.set_ylabel("tokens/s")
    axis.grid(alpha=0.3)
    place_legend(figure, axis)


def place_legend(figure, axis, order: int = 1) -> None:
    """Beside the plot, or below a narrow one, where it would take half of the width."""
    handles, labels = axis.get_legend_handles_labels()
    handles, labels = handles[::order], labels[::order]
    if figure.get_figwidth() < NARROW:
        figure.legend(
            handles, labels, frameon=False, loc="outside lower left", ncols=2 if _short(labels) else 1
        )
        rows = -(-len(labels) // 2) if _short(labels) else len(labels)
        figure.set_figheight(figure.get_figheight() - 0.6 + 0.17 * rows)
    else:
        axis.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _short(labels: Sequence[str]) -> bool:
    return max(map(len, labels), default=0) <= 24


def draw_layers(content: Mapping, figure) -> None:
    """Stacked times of the operations, one bar for each variant, and the time of the whole layer."""
    axis = figure.add_subplot()
    rows = [row for row in content["rows"] if row["operations"]]
    told: set[str] = set()
    for index, row in enumerate(rows):
        bottom = 0.0
        for name, height in row["operations"].items():
            colour, hatch = operation_style(name)
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
            label = None if name in told else name
            axis.bar(index, height, bottom=bottom, width=0.62, label=label, **style)
            bottom += height
            told.add(name)
    for index, row in enumerate(rows):
        label = {"label": "whole layer"} if index == 0 else {}
        axis.hlines(row["layer_ms"], index - 0.42, index + 0.42, color=INK, linewidth=1.8, **label)
        top = max(row["layer_ms"], sum(row["operations"].values()))
        axis.text(index, 1.005 * top, f"{row['layer_ms']:.3g}", ha="center", va="bottom")
    narrow = figure.get_figwidth() < NARROW
    names = [row["variant"].replace(", ", "\n").replace(" ", "\n", 1) for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=6 if narrow else 8)
    axis.set_ylabel("ms")
    axis.margins(y=0.08)
    axis.grid(alpha=0.3, axis="y")
    place_legend(figure, axis, order=-1)


def operation_style(name: str) -> tuple[str, str]:
    """Colour and hatch of an operation: "MLP norm" has that of "norm", "out + shortcut" that of "out"."""
    if "+" in name:
        parts = [part.strip() for part in name.split("+")]
        return next(OPERATIONS[part] for part in ("q", "up", "out", "down") if part in parts), "////"
    return OPERATIONS[name.split()[-1]], ""


def draw_rotation(content: Mapping, figure) -> None:
    """The fused operators' time over unfused torch's by rows, median of the shapes; below 1 they are faster."""
    axis = figure.add_subplot()
    for index, (name, own) in enumerate(over_unfused(content["rows"]).items()):
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axis.plot(list(own), list(own.values()), label=", ".join(name), markersize=5, linewidth=1.5, **look)
    axis.axhline(1, color=INK, linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("rows of a call")
    axis.set_ylabel("time over unfused torch")
    axis.grid(alpha=0.3)
    place_legend(figure, axis)


BARS = {
    "token": token_bars,
    "predict": predict_bars,
    "published": published_bars,
    "vllm": vllm_bars,
    "speculative": speculative_bars,
    "gram": gram_bars,
    "decode attention": attention_bars,
    "kernels": kernel_bars,
    "refit": refit_bars,
    "slicing": slicing_bars,
}
DRAWINGS = {"throughput": draw_throughput, "layers": draw_layers, "rotation": draw_rotation}
