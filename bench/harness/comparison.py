"""Speed-ups within one run: over the best dense row, of the runtime over Hugging Face, of slicing beside its bytes."""

from collections.abc import Callable, Iterable, Sequence


def models_of(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows grouped by model and dtype: only rows of one group are compared."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["dense_parameters"], row["dtype"]), []).append(row)
    return list(groups.values())


def compare(rows: Sequence[dict], figure: str, smaller_is_better: bool) -> str | None:
    """Add `"speedup"` to every row: its speed relative to the best dense row of the same model and dtype.

    Args:
        rows: with `figure` (None where not measured), `"slice"`, `"dtype"`, and `"dense_parameters"`, which
            identifies the model.

    Returns:
        A sentence that names the baselines, for the reader; None where no dense row was measured.
    """
    sentences = []
    for own in models_of(rows):
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


def token_ratios(rows: Sequence[dict]) -> list[dict]:
    """The speed-ups that `bench token` is about, for every model and dtype; rows as `commands.token_time` makes them.

    Returns:
        Rows {comparison, dtype, ratio, bytes_ratio}: the dense model in the runtime over `generate()` with its faster
        cache, and over the fastest Hugging Face engine; every sliced network over the dense one in the same runtime,
        with the ratio of the bytes that a token reads, the upper bound of a memory-bound step.
    """
    found = []
    for own in models_of(rows):
        fused = [row for row in own if row["engine"] == "fused"]
        dense = next((row for row in fused if row["slice"] == 0), None)
        if dense is None:
            continue

        def plainly(row: dict) -> str:
            """The network's label without the dtype, which has its own column."""
            return row["network"].removesuffix(f", {row['dtype']}")

        def fastest(chosen: Callable[[str], bool], own=own) -> dict | None:
            those = [row for row in own if chosen(row["engine"])]
            return min(those, key=lambda row: row["ms_median"], default=None)

        rivals = [
            fastest(lambda name: name.startswith("hf-generate")),
            fastest(lambda name: name.startswith("hf")),
        ]
        for rival in {row["engine"]: row for row in rivals if row is not None}.values():
            found.append(
                {
                    "comparison": f"{plainly(dense)}, fused over {rival['engine']}",
                    "dtype": dense["dtype"],
                    "ratio": rival["ms_median"] / dense["ms_median"],
                    "bytes_ratio": None,
                }
            )
        found += [
            {
                "comparison": f"{plainly(row)} over {plainly(dense)}, fused",
                "dtype": dense["dtype"],
                "ratio": dense["ms_median"] / row["ms_median"],
                "bytes_ratio": dense["read_bytes"] / row["read_bytes"],
            }
            for row in fused
            if row is not dense
        ]
    return found
