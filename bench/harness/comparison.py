"""What a run compares: every row with the best dense one, the runtime with Hugging Face, slicing with its bytes."""

from collections.abc import Callable, Iterable, Sequence


def models_of(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows of every model in every dtype: only those are compared."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["dense_parameters"], row["dtype"]), []).append(row)
    return list(groups.values())


def compare(rows: Sequence[dict], figure: str, smaller_is_better: bool) -> str | None:
    """Add `"speedup"` to every row: how many times as fast as the best dense row of the same model and dtype.

    Args:
        rows: with `figure` (None where not measured), `"slice"`, `"dtype"`, and `"dense_parameters"`, which tells
            models apart.

    Returns:
        A sentence that names the baselines; None where no dense row was measured.
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
    """What `bench token` was run for, of every model and dtype; rows as `commands.token_time` makes them.

    Returns:
        Rows {comparison, dtype, ratio, bytes_ratio}: the runtime on the dense model over the faster of `generate()`'s
        caches, and over the fastest way of Hugging Face's; every sliced network over the dense one in the same runtime,
        beside the ratio of the bytes that a token reads, which bounds it where memory does.
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
