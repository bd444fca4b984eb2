"""Draw docs/images/frontier.svg from the recorded results: `python docs/frontier_plot.py` (extra `plot`)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter, ScalarFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
TITLES = {
    "sotu-1990-on": "Addresses from 1990 on\n(the domain of the calibration text)",
    "shakespeare": "Shakespeare\n(out of domain)",
    "python-reference": "Python's reference\n(out of domain)",
}
# Method in the results, label, colour (Okabe and Ito's, told apart by colour-blind readers), marker, label offset.
METHODS = (
    ("published", "published SliceGPT", "#D55E00", "s"),
    ("sparsegpt-2:4", "SparseGPT 2:4", "#CC79A7", "D"),
    ("ours", "this project", "#0072B2", "o"),
)


def points() -> list[dict]:
    """The points of the frontier and of SparseGPT: the same calibration text and the same test windows."""
    files = ("frontier.json", "sparsegpt.json")
    return [
        point
        for file in files
        for point in json.loads((RESULTS / file).read_text(encoding="utf-8"))["points"]
    ]


def draw(file: Path) -> None:
    """Perplexity over the decoder's stored bytes, one panel for each test text."""
    pyplot.rcParams.update({"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "frontier"})
    every = points()
    dense = next(point for point in every if point["method"] == "dense")
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4.1), sharey=True, facecolor="white")
    for axis, (text, title) in zip(axes, TITLES.items(), strict=True):
        base = dense["perplexity"][text]
        axis.axhline(base, color="0.35", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(f"dense {base:.1f}", (0.505, base), xytext=(0, -4), textcoords="offset points",
                      va="top", ha="right", fontsize=9, color="0.25")  # fmt: skip
        for method, label, colour, marker in METHODS:
            line = sorted(
                (point for point in every if point["method"] == method),
                key=lambda point: point["decoder_bytes"],
            )
            x = [point["decoder_bytes"] / dense["decoder_bytes"] for point in line]
            y = [point["perplexity"][text] for point in line]
            axis.plot(x, y, marker=marker, color=colour, markersize=6, linewidth=2, label=label, zorder=3,
                      markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
        axis.plot(1, base, "*", color="black", markersize=12, zorder=4)
        axis.set_yscale("log")
        axis.set_xlim(1.03, 0.5)
        axis.set_ylim(8, 4000)
        axis.yaxis.set_major_locator(FixedLocator([10, 20, 50, 100, 200, 500, 1000, 2000]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(which="minor", left=False)
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_title(title, fontsize=10)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("perplexity (lower is better)")
    axes[1].set_xlabel("decoder layers as stored, shortcuts included, as a share of the dense model's bytes")
    axes[0].legend(loc="upper left", frameon=False, fontsize=9.5, borderaxespad=0.2)
    figure.suptitle("SmolLM2-135M-Instruct, float32", fontsize=11, y=0.99)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(ROOT / "docs" / "images" / "frontier.svg")
