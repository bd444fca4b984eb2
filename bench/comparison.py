"""The speed-up of every row against the best dense one of its run."""

from collections.abc import Sequence


def compare(rows: Sequence[dict], figure: str, smaller_is_better: bool) -> str | None:
    """Add `"speedup"` to every row: how many times as fast as the best dense row of the same model.

    Args:
        rows: with `figure` (None where not measured), `"slice"` and `"dense_parameters"`, which tells models apart.

    Returns:
        A sentence that names the baselines; None where no dense row was measured.
    """
    sentences = []
    for model in dict.fromkeys(row["dense_parameters"] for row in rows):
        own = [row for row in rows if row["dense_parameters"] == model]
        dense = [row for row in own if row["slice"] == 0 and row.get(figure)]
        for row in own:
            row["speedup"] = None
        if not dense:
            continue
        choose = min if smaller_is_better else max
        best = choose(dense, key=lambda row: row[figure])
        for row in own:
            if row.get(figure):
                ratio = row[figure] / best[figure]
                row["speedup"] = 1 / ratio if smaller_is_better else ratio
        others = ", ".join(f"{row['engine']} {row[figure]:.4g}" for row in dense if row is not best)
        sentences.append(
            f"Best dense baseline: {best['engine']} ({best['network']}, {best[figure]:.4g}"
            + (f"; {others})" if others else ")")
        )
    if not sentences:
        return None
    return ". ".join(sentences) + ". Speed-ups are against it."
