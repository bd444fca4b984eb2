"""Plots of results (extra `plot`): one for every kind that has figures to compare."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from slicegpt.bench.harness.titles import threads_of, title_of
from slicegpt.bench.report import quality_charts, speed_charts
from slicegpt.bench.report.bars import INK, draw_bars
from slicegpt.errors import SliceGPTError

ENDINGS = (".png", ".svg")
# Inches. The page shows the narrow form on telephones, where the wide one's letters would be half as large.
WIDE, TELEPHONE = 9.0, 3.65

BARS = speed_charts.BARS | quality_charts.BARS
DRAWINGS = speed_charts.DRAWINGS | quality_charts.DRAWINGS


def check_plot(option: str, file: str | Path) -> None:
    """Raise `SliceGPTError`, before anything is measured, where the plot could not be drawn."""
    if Path(file).suffix not in ENDINGS:
        raise SliceGPTError(f"{option}: expected a file that ends in {' or '.join(ENDINGS)}, got {file}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SliceGPTError(f'{option}: plots need matplotlib: pip install "slicegpt[plot]"')


def draw(content: Mapping, width: float = WIDE, title: str = ""):
    """The matplotlib figure of one result, `width` inches wide; None where this kind has no plot, or no rows yet."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SliceGPTError('plots need matplotlib: pip install "slicegpt[plot]"')
    kind = content["benchmark"]
    if kind not in BARS and kind not in DRAWINGS:
        return None
    chart = BARS[kind](content) if kind in BARS else None
    if chart is not None and not any(group.bars for group in chart.groups):
        return None
    if kind in DRAWINGS and not (content.get("rows") or content.get("points") or content.get("boundaries")):
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    ink |= {"axes.labelcolor": INK, "axes.edgecolor": INK, "svg.fonttype": "none"}
    ink |= {"font.size": 9 if width > 5 else 8, "font.family": "sans-serif"}
    with rc_context(ink):
        figure = Figure(figsize=(width, chart.height if chart else 4.0), layout="constrained")
        if chart is not None:
            draw_bars(chart, figure.add_subplot())
        else:
            DRAWINGS[kind](content, figure)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
        if title:
            figure.suptitle(title, fontsize=9, color=INK)
        # Laid out here, once: elsewhere the letters' size would be another.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def plot_results(content: Mapping, file: str | Path) -> None:
    """Draw one result to a .png or .svg file, titled with what was measured, and on which device."""
    check_plot("--plot", file)
    where = content["environment"]
    threads = f", {threads_of(where)}" if where.get("driver") is None else ""
    figure = draw(content, title=f"{title_of(content)} ({where['device']}{threads})")
    if figure is not None:
        figure.savefig(file, dpi=150)
