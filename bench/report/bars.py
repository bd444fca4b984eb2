"""Horizontal bars in groups, each with its value at its end: the plot of most kinds of results."""

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's, distinguishable with any colour vision on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#999999")
GREY = "#999999"
# An engine has the same colour on every page: this package's are blue and green, Hugging Face's warm.
ENGINE_COLOURS = {
    "fused": "#0072B2",
    "plain": "#56B4E9",
    "plain-compile": "#009E73",
    "hf": "#E69F00",
    "hf-eager": "#F0C266",
    "hf-static": "#C9A227",
    "hf-compile": "#D55E00",
    "hf-generate": "#CC79A7",
    "hf-generate-static": "#8C564B",
}
# Of text and lines; the page replaces it in dark mode.
INK = "#1A1A1A"
# Inches of a bar and of a group's title.
BAR, TITLE = 0.235, 0.3
# A figure that is narrower has its legend below, and its panels below each other.
NARROW = 5.0
# Of the axis, what the letters of a value take at most.
LETTERS = 0.16


@dataclass(frozen=True)
class Bar:
    """One value.

    Attributes:
        span: the 10th and 90th percentile, drawn as a line through the bar's end.
    """

    label: str
    value: float
    colour: str = COLOURS[0]
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """Bars under one title; `mark` is drawn through them as a dashed line."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None


@dataclass(frozen=True)
class BarChart:
    """Groups on one axis of `unit`; `mark` says what the dashed lines are."""

    unit: str
    groups: Sequence[Group]
    mark: str = ""

    @property
    def height(self) -> float:
        """Inches."""
        titles = sum(bool(group.title) for group in self.groups)
        marks = any(group.mark for group in self.groups)
        return 0.75 + 0.3 * marks + TITLE * titles + BAR * sum(len(group.bars) for group in self.groups)


def written(value: float) -> str:
    """At a bar's end: three digits, whole numbers from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw_bars(chart: BarChart, axis) -> None:
    """Draw a chart on a matplotlib axis; the first group stands at the top."""
    places, labels, position = [], [], 0.0
    step = TITLE / BAR
    ends = [max(bar.value, bar.span[1] if bar.span else 0) for group in chart.groups for bar in group.bars]
    reach = max([*ends, *(group.mark for group in chart.groups if group.mark)], default=1) or 1
    for group in chart.groups:
        if group.title:
            position += step
            axis.annotate(
                group.title,
                (0, position - 0.62),
                xytext=(4, 0),
                textcoords="offset points",
                fontweight="bold",
                ha="left",
                va="bottom",
                annotation_clip=False,
            )
        top = position
        for bar in group.bars:
            axis.barh(position, bar.value, height=0.72, color=bar.colour)
            end = bar.value
            if bar.span:
                axis.plot(bar.span, [position] * 2, color=INK, linewidth=0.9, alpha=0.7)
                end = max(end, bar.span[1])
            if group.mark and end < group.mark + 0.01 * reach < end + LETTERS * reach:
                end = group.mark  # beside the dashed line, not under it
            axis.text(end + 0.012 * reach, position, written(bar.value), ha="left", va="center")
            places.append(position)
            labels.append(bar.label)
            position += 1
        if group.mark:
            label = {"label": chart.mark} if "mark" not in axis.get_label() else {}
            axis.set_label("mark")
            axis.plot(
                [group.mark] * 2, [top - 0.46, position - 0.54], "--", color=INK, linewidth=1.3, **label
            )
    narrow = axis.figure.get_figwidth() < NARROW
    axis.set_yticks(places, labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(position - 0.4, -0.6)
    axis.set_xlim(0, (1.22 if narrow else 1.14) * reach)
    axis.set_xlabel(chart.unit.replace(" (", "\n(") if narrow else chart.unit)
    axis.grid(alpha=0.3, axis="x")
    if any(group.mark for group in chart.groups):
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
