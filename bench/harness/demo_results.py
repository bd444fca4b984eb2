"""The demo's result: a row for each model and what runs it; its plot, perplexity over bytes with tokens/s beside it."""

from collections.abc import Mapping, Sequence

COLUMNS = ["model", "runs in", "bytes", "perplexity", "tokens/s", "speed-up"]
# Engine of `slicegpt bench token` -> what it is called here.
ENGINES = {"hf-generate": "generate()", "fused": "runtime"}


def demo_rows(quality: Mapping[str, Mapping], token_rows: Sequence[Mapping]) -> list[dict]:
    """Rows for the table and the plot, the dense model in Hugging Face's generate() first where it was measured.

    Args:
        quality: of each model, by label: `parameters`, `bytes`, `perplexity`.
        token_rows: of `slicegpt bench token`: `network` (a label), `engine`, `tokens_per_second`.
    """
    first = next((row["tokens_per_second"] for row in token_rows if row["engine"] == "hf-generate"), None)
    rows = []
    for row in token_rows:
        rate = row["tokens_per_second"]
        own = {"model": row["network"], "engine": ENGINES[row["engine"]], **quality[row["network"]]}
        rows.append(own | {"tokens_per_second": rate, "speedup": rate / first if first else None})
    return rows


# Of the runtime's bars and the line, and of Hugging Face's bar.
OURS, THEIRS = "#0072B2", "#999999"


def draw_demo(content: Mapping, axis) -> None:
    """Perplexity over the bytes of the weights; beside it tokens/s of each model and what runs it, as bars."""
    rows = content["rows"]
    grid = axis.figure.add_gridspec(1, 2)
    axis.set_subplotspec(grid[0])
    models = {row["model"]: row for row in rows}.values()
    sizes, values = [row["bytes"] / 1e6 for row in models], [row["perplexity"] for row in models]
    axis.plot(sizes, values, "o-", color=OURS, linewidth=1.5)
    for row, size, value in zip(models, sizes, values, strict=True):
        label = f"{row['model']}: {value:.4g}"
        axis.annotate(label, (size, value), xytext=(7, 3), textcoords="offset points", fontsize=8)
    axis.margins(x=0.35, y=0.15)
    axis.set_xlabel("weights, MB")
    axis.set_ylabel("perplexity")
    axis.grid(alpha=0.3)

    beside = axis.figure.add_subplot(grid[1])
    shown = rows[::-1]
    colours = [OURS if row["engine"] == "runtime" else THEIRS for row in shown]
    labels = [f"{row['model']},\n{row['engine']}" for row in shown]
    bars = beside.barh(labels, [row["tokens_per_second"] for row in shown], color=colours)
    beside.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
    beside.set_xlabel("tokens/s")
    beside.margins(x=0.15)
    beside.grid(alpha=0.3, axis="x")
