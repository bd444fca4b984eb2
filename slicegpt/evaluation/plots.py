"""The plot of the frontier (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from slicegpt.errors import SliceGPTError


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
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    key = "bytes" if basis == "total" else "decoder_bytes"
    dense, texts = points[0], list(points[0]["perplexity"])
    scale, unit = (1e9, "GB") if dense[key] >= 2e9 else (1e6, "MB")
    methods = list(dict.fromkeys(point["method"] for point in points[1:]))
    figure, axes = pyplot.subplots(1, len(texts), figsize=(1 + 3.8 * len(texts), 4), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        axis.axhline(dense["perplexity"][text], color="0.6", linewidth=1, linestyle="--", zorder=1)
        axis.plot(
            dense[key] / scale, dense["perplexity"][text], "*", color="black", markersize=10, label="dense"
        )
        for index, method in enumerate(methods):
            line = sorted(
                (point for point in points if point["method"] == method), key=lambda point: point[key]
            )
            axis.plot(
                [point[key] / scale for point in line],
                [point["perplexity"][text] for point in line],
                marker="osD^v"[index % 5],
                color=f"C{index}",
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
        axis.set_xlabel(f"{'all weights' if basis == 'total' else 'decoder weights'}, {unit} as stored")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("perplexity")
    axes[0][0].legend(fontsize=9)
    figure.savefig(file, dpi=140, bbox_inches="tight")
    pyplot.close(figure)
