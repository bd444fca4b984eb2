"""The plot of the frontier (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from slicegpt.errors import SliceGPTError

# Okabe and Ito's, told apart with any colour vision.
METHOD_COLOURS = {"ours": "#0072B2", "published": "#D55E00", "sparsegpt-2:4": "#CC79A7", "compact": "#009E73"}


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise SliceGPTError("plots need matplotlib: pip install slicegpt[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_frontier(points: Sequence[dict], basis: str, file: str | Path) -> None:
    """Perplexity over true bytes, one panel a text and one line a method.

    Args:
        points: as `slicegpt.evaluation.frontier.run_frontier` returns them, the dense model's first.
        basis: "total" plots all bytes of a model, "decoder" those of its layers.
        file: .png or .svg to write.
    """
    pyplot = _pyplot()
    key = "bytes" if basis == "total" else "decoder_bytes"
    texts = list(points[0]["perplexity"])
    figure, axes = pyplot.subplots(1, len(texts), figsize=(1 + 3.8 * len(texts), 4), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        frontier_panel(axis, points, text, key)
    axes[0][0].set_ylabel("perplexity")
    axes[0][0].legend(fontsize=9)
    figure.savefig(file, dpi=140, bbox_inches="tight")
    pyplot.close(figure)


def frontier_panel(axis, points: Sequence[dict], text: str, key: str) -> None:
    """Perplexity on one text over stored bytes, one line a method, on a matplotlib axis.

    Args:
        points: as for `plot_frontier`.
        text: its name in their perplexities.
        key: "bytes" of the whole model, or "decoder_bytes" of its layers.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    dense = points[0]
    scale, unit = (1e9, "GB") if dense[key] >= 2e9 else (1e6, "MB")
    axis.axhline(dense["perplexity"][text], color="0.6", linewidth=1, linestyle="--", zorder=1)
    axis.plot(dense[key] / scale, dense["perplexity"][text], "*", color="0.5", markersize=10, label="dense")
    for index, method in enumerate(dict.fromkeys(point["method"] for point in points[1:])):
        line = sorted((point for point in points if point["method"] == method), key=lambda point: point[key])
        axis.plot(
            [point[key] / scale for point in line],
            [point["perplexity"][text] for point in line],
            marker="osD^v"[index % 5],
            color=METHOD_COLOURS.get(method, f"C{index}"),
            markersize=5,
            linewidth=1.5,
            label=method,
        )
    axis.set_yscale("log")
    # Perplexities as plain numbers: a log axis of less than a decade has no power of ten to label.
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(text, fontsize=10)
    axis.set_xlabel(f"{'all weights' if key == 'bytes' else 'decoder weights'}, {unit} as stored")
    axis.grid(alpha=0.3)
