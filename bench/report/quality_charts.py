"""Plots of what slicing keeps: perplexity over size, sizes side by side, recovery, the shape of a sliced model."""

import math
from collections.abc import Mapping

from slicegpt.bench.report.bars import COLOURS, GREY, INK, NARROW, Bar, BarChart, Group, draw_bars
from slicegpt.evaluation.plots import frontier_panel


def perplexities(rows, label: str) -> BarChart:
    """A bar for each model; the first, the dense one, is grey."""
    rows = [row for row in rows if row.get("perplexity")]
    bars = [
        Bar(str(row[label]), row["perplexity"], COLOURS[0] if index else GREY)
        for index, row in enumerate(rows)
    ]
    return BarChart("perplexity", [Group("", bars)])


def equal_size_bars(content: Mapping) -> BarChart:
    return perplexities(content.get("rows", ()), "shortcuts")


def recovery_bars(content: Mapping) -> BarChart:
    return perplexities(content.get("evaluation", {}).get("models", ()), "model")


def evaluation_bars(content: Mapping) -> BarChart:
    return perplexities(content.get("rows", ()), "model")


def finetuning_bars(content: Mapping) -> BarChart:
    bars = [
        Bar("before", math.exp(content["loss_before"]), GREY),
        Bar("after", math.exp(content["loss_after"])),
    ]
    return BarChart("held-out perplexity", [Group("", bars)])


def panels(figure, count: int, inches: float = 3.2):
    """Axes side by side, or below each other where the figure is narrow."""
    if figure.get_figwidth() < NARROW:
        figure.set_figheight(inches * count)
        return list(figure.subplots(count, 1, squeeze=False)[:, 0])
    return list(figure.subplots(1, count, squeeze=False)[0])


def draw_frontier(content: Mapping, figure) -> None:
    """Perplexity over the decoder's stored bytes, one panel a text, one line a method."""
    points = [_by_calibration(point, content["points"]) for point in content["points"]]
    points.sort(key=lambda point: point["method"] != "dense")
    texts = list(points[0]["perplexity"])
    axes = panels(figure, len(texts))
    for axis, text in zip(axes, texts, strict=True):
        frontier_panel(axis, points, text, "decoder_bytes")
    axes[0].set_ylabel("perplexity")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=1 if len(axes) == 1 else 3)


def _by_calibration(point: Mapping, points) -> dict:
    """A point whose method names the calibration text as well, where points of one method differ in it."""
    texts = {other.get("calibration") for other in points if other["method"] == point["method"]}
    if len(texts) < 2 or not point.get("calibration"):
        return dict(point)
    return point | {"method": f"{point['method']}, {point['calibration']}"}


def draw_sizes(content: Mapping, figure) -> None:
    """Perplexity over stored bytes, and tokens/s beside it."""
    rows = content["rows"]
    left, right = panels(figure, 2)
    megabytes = [row["bytes"] / 1e6 for row in rows]
    left.plot(megabytes, [row["perplexity"] for row in rows], "o-", color=COLOURS[0], linewidth=1.5)
    left.plot(megabytes[:1], [rows[0]["perplexity"]], "*", color=INK, markersize=11)
    for row, at in zip(rows, megabytes, strict=True):
        place = {"xytext": (4, 6), "textcoords": "offset points"}
        left.annotate(f"{100 * row['size']:g} %", (at, row["perplexity"]), **place)
    left.set_ylabel("perplexity (star: dense)")
    for index, dtype in enumerate(("float32", "bfloat16")):
        key = f"tokens_per_second_{dtype}"
        own = [(at, row[key]) for row, at in zip(rows, megabytes, strict=True) if row.get(key)]
        if own:
            look = {"color": COLOURS[index], "linewidth": 1.5, "label": dtype}
            right.plot(*zip(*own, strict=True), "os"[index] + "-", **look)
    right.set_ylabel("tokens/s, batch 1")
    right.set_ylim(bottom=0)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("weights in float32, MB")
        axis.margins(x=0.12, y=0.15)
        axis.grid(alpha=0.3)


def draw_demo(content: Mapping, figure) -> None:
    """Perplexity over the bytes of the weights; beside it tokens/s of each model and what runs it."""
    rows = content["rows"]
    left, right = panels(figure, 2, inches=2.6)
    models = list({row["model"]: row for row in rows}.values())
    sizes, values = [row["bytes"] / 1e6 for row in models], [row["perplexity"] for row in models]
    left.plot(sizes, values, "o-", color=COLOURS[0], linewidth=1.5)
    for row, size, value in zip(models, sizes, values, strict=True):
        place = {"xytext": (5, 5), "textcoords": "offset points"}
        left.annotate(f"{row['model'].removesuffix(' of parameters')}: {value:.4g}", (size, value), **place)
    left.margins(x=0.35, y=0.15)
    left.set_xlabel("weights, MB")
    left.set_ylabel("perplexity")
    left.grid(alpha=0.3)
    # Hugging Face's bars are grey.
    bars = []
    for row in (row for row in rows if row.get("tokens_per_second")):
        colour = GREY if "generate" in row["engine"] else COLOURS[0]
        bars.append(Bar(f"{row['model']},\n{row['engine']}", row["tokens_per_second"], colour))
    draw_bars(BarChart("tokens/s", [Group("", bars)]), right)


def draw_model(content: Mapping, figure) -> None:
    """Widths of the boundaries, and neurons of the layers, against the dense model's."""
    left, right = panels(figure, 2)
    widths = [boundary["width"] for boundary in content["boundaries"]]
    left.step(range(len(widths)), widths, where="mid", color=COLOURS[0])
    left.axhline(content["dense_width"], color=INK, linestyle="--", linewidth=1)
    left.set_xlabel("boundary")
    left.set_ylabel("width (dashed: dense)")
    neurons = content["neurons"]
    neurons = neurons if isinstance(neurons, list) else [neurons] * (content.get("layers") or 1)
    right.bar(range(len(neurons)), neurons, color=COLOURS[2])
    right.axhline(content["dense_neurons"], color=INK, linestyle="--", linewidth=1)
    right.set_xlabel("layer")
    right.set_ylabel("neurons of its MLP")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)


BARS = {
    "equal size": equal_size_bars,
    "recovery": recovery_bars,
    "evaluation": evaluation_bars,
    "finetuning": finetuning_bars,
}
DRAWINGS = {
    "frontier": draw_frontier,
    "sizes": draw_sizes,
    "demo": draw_demo,
    "model": draw_model,
    "slicing record": draw_model,
}
