"""Plots of results (extra `plot`): throughput over batch, stacked operation times, tokens/s over stored size, stages.

The colours are Okabe and Ito's, distinguishable with any colour vision on white and on black.
"""

import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path

from slicegpt.bench.harness.demo_results import draw_demo
from slicegpt.bench.harness.display import threads_of, title_of
from slicegpt.errors import SliceGPTError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#999999")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":")

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
# Of text and lines; the report page replaces it in dark mode.
INK = "#1A1A1A"
ENDINGS = (".png", ".svg")


def check_plot(option: str, file: str | Path) -> None:
    """Raise `SliceGPTError`, before anything is measured, where the plot could not be drawn."""
    if Path(file).suffix not in ENDINGS:
        raise SliceGPTError(f"{option}: expected a file that ends in {' or '.join(ENDINGS)}, got {file}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SliceGPTError(f'{option}: plots need matplotlib: pip install "slicegpt[plot]"')


def draw(content: Mapping):
    """The matplotlib figure of one result; None where this benchmark has no plot, or no rows yet."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SliceGPTError('plots need matplotlib: pip install "slicegpt[plot]"')
    drawing = DRAWINGS.get(content["benchmark"])
    if drawing is None or not content.get("rows"):
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    ink |= {"axes.labelcolor": INK, "axes.edgecolor": INK, "svg.fonttype": "none", "font.size": 9}
    with rc_context(ink):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        drawing(content, figure.add_subplot())
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure


def plot_results(content: Mapping, file: str | Path) -> None:
    """Draw one result to a .png or .svg file, titled with what was measured, and on which device."""
    check_plot("--plot", file)
    figure = draw(content)
    if figure is not None:
        where = content["environment"]
        threads = f", {threads_of(where)}" if where.get("driver") is None else ""
        figure.suptitle(f"{title_of(content)} ({where['device']}{threads})", fontsize=9, color=INK)
        figure.savefig(file, dpi=150)


def _styles(labels) -> dict[str, dict]:
    return {
        label: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for index, label in enumerate(dict.fromkeys(labels))
    }


def draw_throughput(content: Mapping, axis) -> None:
    """Tokens/s over the batch, one line for each case, the fastest measurement marked."""
    points = content["points"]
    styles = _styles(f"{point['network']}, {point['engine']}" for point in points)
    for label, style in styles.items():
        line = {}
        for point in points:
            if f"{point['network']}, {point['engine']}" == label:
                line[point["batch"]] = max(line.get(point["batch"], 0), point["tokens_per_second"])
        batches = sorted(line)
        axis.plot(batches, [line[b] for b in batches], label=label, markersize=4, linewidth=1.5, **style)
    for row in content["rows"]:
        if row["batch"]:
            colour = styles[f"{row['network']}, {row['engine']}"]["color"]
            axis.plot(
                row["batch"],
                row["tokens_per_second"],
                "o",
                markersize=12,
                markerfacecolor="none",
                color=colour,
            )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch (ring: the fastest measurement)")
    axis.set_ylabel("tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)


def draw_token(content: Mapping, axis) -> None:
    """Tokens/s over the bytes of the weights, one line for each engine and dtype."""
    rows = content["rows"]
    styles = _styles(row["engine"] for row in rows)
    dtypes = list(dict.fromkeys(row.get("dtype") for row in rows))
    largest = max(row["bytes"] for row in rows)
    scale, unit = (1e9, "GB") if largest >= 2e9 else (1e6, "MB")
    told: set[str] = set()
    for (engine, style), (index, dtype) in itertools.product(styles.items(), enumerate(dtypes)):
        chosen = (row for row in rows if (row["engine"], row.get("dtype")) == (engine, dtype))
        own = sorted(chosen, key=lambda row: row["bytes"])
        if not own:
            continue
        sizes = [row["bytes"] / scale for row in own]
        middle = [row["tokens_per_second"] for row in own]
        # The 90th percentile of the time is the lower rate.
        spread = [
            [1000 * row["batch"] * abs(1 / row["ms_median"] - 1 / row[key]) for row in own]
            for key in ("ms_p90", "ms_p10")
        ]
        label = engine if engine not in told else None  # the sizes show the dtype
        told.add(engine)
        look = {"capsize": 3, "linewidth": 1.5, "markersize": 5, "linestyle": LINES[index % len(LINES)]}
        axis.errorbar(sizes, middle, yerr=spread, label=label, **look, **style)
    for size, label in {row["bytes"]: row["network"] for row in rows}.items():
        axis.axvline(size / scale, linewidth=0.8, linestyle=":", color="#888888", zorder=0)
        axis.annotate(
            label,
            (size / scale, 0),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            ha="right",
            va="bottom",
            xytext=(-2, 4),
            textcoords="offset points",
        )
    axis.set_ylim(bottom=0)
    axis.margins(x=0.12)
    axis.set_xlabel(f"weights as stored, {unit}")
    axis.set_ylabel(f"tokens/s, batch {rows[0]['batch']} (bars: 10th to 90th percentile)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)


def draw_layers(content: Mapping, axis) -> None:
    """Stacked times of the operations, one bar for each variant, and the time of the whole layer."""
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
    axis.set_xticks(range(len(rows)), [row["variant"].replace(", ", "\n") for row in rows], fontsize=8)
    axis.set_ylabel("ms")
    axis.margins(y=0.05)
    axis.grid(alpha=0.3, axis="y")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], labels[::-1], fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )


def operation_style(name: str) -> tuple[str, str]:
    """Colour and hatch of an operation: "MLP norm" has that of "norm", "out + shortcut" that of "out"."""
    if "+" in name:
        parts = [part.strip() for part in name.split("+")]
        return next(OPERATIONS[part] for part in ("q", "up", "out", "down") if part in parts), "////"
    return OPERATIONS[name.split()[-1]], ""


def draw_slicing(content: Mapping, axis) -> None:
    """Seconds of every stage of slicing, and of one dense forward pass."""
    rows = content["rows"][::-1]
    colours = ["#999999" if "dense" in row["stage"] else COLOURS[0] for row in rows]
    bars = axis.barh([row["stage"] for row in rows], [row["seconds"] for row in rows], color=colours)
    axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
    axis.set_xlabel("seconds")
    axis.margins(x=0.1)
    axis.grid(alpha=0.3, axis="x")


DRAWINGS = {
    "throughput": draw_throughput,
    "token": draw_token,
    "layers": draw_layers,
    "slicing": draw_slicing,
    "demo": draw_demo,
}
