"""Do two runs agree? Their ratios, side by side.

Times change with a machine's clocks and load; the claims are ratios, measured within one run. So the ratios of two runs
are compared: every speed-up, the comparisons of `bench token`, and the cost of slicing in dense passes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from slicegpt.bench.harness.titles import title_of
from slicegpt.errors import SliceGPTError


def ratios_of(content: Mapping) -> dict[str, float]:
    """The ratios of one result by name, without those of a baseline to itself, which are 1."""
    found = {}
    for row in content.get("rows", ()):
        name = row.get("variant") or f"{row.get('network')}, {row.get('engine')}"
        if row.get("speedup") not in (None, 1):
            found[name] = row["speedup"]
    for row in content.get("ratios") or ():
        found[f"{row['comparison']}, {row['dtype']}"] = row["ratio"]
    if content.get("ratio"):
        found["slicing, in dense passes"] = content["ratio"]
    return found


def compare_runs(
    first: Sequence[tuple[Path, Mapping]], second: Sequence[tuple[Path, Mapping]], folders: Sequence[Path]
) -> list[dict]:
    """Rows {result, ratio of, first, second, apart} for every ratio that two folders of results both have.

    Args:
        first, second: as `results.read_results` returns them; files of the same name are compared.
        folders: of the first and of the second.

    Raises:
        SliceGPTError: no file has a ratio in common with the file of the same name.
    """
    others = {file.relative_to(folders[1]): content for file, content in second}
    rows = []
    for file, content in first:
        other = ratios_of(others.get(file.relative_to(folders[0]), {}))
        for name, ratio in ratios_of(content).items():
            if name in other:
                larger, smaller = max(ratio, other[name]), min(ratio, other[name])
                rows.append(
                    {
                        "result": title_of(content),
                        "ratio of": name,
                        "first": ratio,
                        "second": other[name],
                        "apart": larger / smaller - 1,
                    }
                )
    if not rows:
        raise SliceGPTError(f"--against: {folders[0]} and {folders[1]} have no ratio in common")
    return rows
