"""The quality frontier against the published method, and the project's targets for it.

    python -m slicegpt.bench.commands.bench_frontier MODEL --calibration IN.txt --data IN.txt,OUT.txt --output runs/grid

Methods are compared at the size that the published form stores: for every nominal size its nearest width, and every
other method may store at most as much. The loss is the log-perplexity above the dense model's. Results are saved point
by point in the output folder; the same command resumes an interrupted run, and `--rerun ours` measures one method
again. Methods measured at the same time into separate folders are merged with

    python -m slicegpt.bench.commands.bench_frontier MODEL --compare runs/published runs/ours
"""

import argparse
import json
from pathlib import Path

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import write_results
from slicegpt.checkpoint.loading import load_dense
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.conversion.stock_plan import with_own_head
from slicegpt.evaluation.frontier import loss_ratio
from slicegpt.evaluation.frontier_run import FrontierOptions, measure_frontier
from slicegpt.evaluation.methods import BASES, METHODS, describe_widths, plan_point
from slicegpt.families import canonical_fields
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe

# (basis, nominal size) -> largest fraction of the published method's loss, in and out of the calibration's domain.
TARGETS = {
    ("decoder", 0.91): (0.25, 0.5),
    ("decoder", 0.80): (0.40, 0.5),
    ("decoder", 0.70): (0.55, 1.0),
    ("total", 0.95): (0.25, 1.0),
    ("total", 0.90): (0.25, 1.0),
    ("total", 0.80): (0.25, 1.0),
}


def published_size(fields: dict, nominal: float, basis: str) -> float:
    """The size, as a fraction, of the published form at the width where it is nearest to `nominal`."""
    method, count = METHODS["published"], BASES[basis]
    whole = (
        fields["source_parameters"]
        if basis == "total"
        else count(plan(fields, constant_widths(fields, fields["dense_hidden_size"])))
    )
    step = method.round_to
    shape = with_own_head(fields) if fields["tie_word_embeddings"] else fields
    below = plan_point(method, fields, nominal, basis, step)[0].boundary_widths[0]
    sizes = [
        count(plan(shape, constant_widths(shape, width), Shape.of(method.recipe()))) / whole
        for width in (below, below + step)
    ]
    return min(sizes, key=lambda size: abs(size - nominal))


def compare(content: dict, method: str, fields: dict, round_to: int) -> list[dict]:
    """A row for every target and text: sizes and perplexities of both methods, the ratio of losses, the target."""

    def find(name: str, size: float, basis: str) -> dict | None:
        widths = describe_widths(plan_point(METHODS[name], fields, size, basis, round_to)[0])
        matches = [p for p in content["points"] if (p["method"], p["widths"]) == (name, widths)]
        return matches[-1] if matches else None

    dense = next(point for point in content["points"] if point["method"] == "dense")
    rows = []
    for (basis, nominal), (inside, outside) in TARGETS.items():
        size = published_size(fields, nominal, basis)
        point, published = find(method, size, basis), find("published", size, basis)
        if point is None or published is None:
            continue
        for index, text in enumerate(dense["perplexity"]):
            ratio, target = loss_ratio(point, published, dense, text), outside if index else inside
            rows.append(
                {
                    "size": f"{basis} {nominal:g}",
                    "text": text,
                    "dense": dense["perplexity"][text],
                    "published": published["perplexity"][text],
                    "at": published["widths"],
                    method: point["perplexity"][text],
                    "width": point["widths"],
                    "loss ratio": round(ratio, 3),
                    "target": target,
                    "met": "yes" if ratio <= target else "no",
                }
            )
    return rows


def measure(options: argparse.Namespace, fields: dict) -> None:
    """Measure the frontier for every basis, at the published method's sizes."""
    recipe = Recipe(
        model=options.model,
        calibration=options.calibration,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        round_to=options.round_to,
        dtype="float32",
    )
    rerun = [name for name in options.rerun.split(",") if name]
    for basis in options.bases.split(","):
        sizes = [published_size(fields, nominal, basis) for of, nominal in TARGETS if of == basis]
        what = FrontierOptions(
            options.data,
            options.output,
            sizes,
            options.method.split(","),
            basis,
            windows=options.windows,
            rerun=rerun,
        )
        print(measure_frontier(what, recipe, progress=Progress()))
        rerun = []  # the second basis may share points with the first


def merge(folders: list[str]) -> dict:
    """The points of several frontiers; of a point measured twice, the last folder's counts.

    Texts, model and dtype must agree. Calibrations may differ: each method chooses its own, and each point records it.
    """
    contents = [json.loads(Path(folder, "frontier.json").read_text(encoding="utf-8")) for folder in folders]
    own = ("calibration", "calibration_sha256")
    common = [{k: v for k, v in content["settings"].items() if k not in own} for content in contents]
    for folder, settings in zip(folders, common, strict=True):
        if settings != common[0]:
            raise SystemExit(f"{folder} was measured with other settings than {folders[0]}")
    points = [
        point | {name: content["settings"].get(name) for name in own}
        for content in contents
        for point in content["points"]
    ]
    return contents[0] | {"settings": common[0], "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--calibration")
    parser.add_argument("--data", help="the calibration's domain first")
    parser.add_argument(
        "--compare", nargs="+", metavar="DIR", help="compare existing results, measure nothing"
    )
    parser.add_argument(
        "--method", default="published,ours", help="methods to measure, as of slicegpt frontier"
    )
    parser.add_argument("--bases", default="decoder,total")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--rerun", default="", help="methods to measure again")
    parser.add_argument("--output", default="runs/grid", metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    fields = canonical_fields(load_dense(options.model)[0])
    if not options.compare:
        if not options.calibration or not options.data:
            parser.error("--calibration and --data are needed")
        measure(options, fields)
    content = merge(options.compare or [options.output])
    measured = list(dict.fromkeys(p["method"] for p in content["points"]))
    measured = [name for name in measured if name in METHODS and name != "published"]
    comparisons = {name: compare(content, name, fields, options.round_to) for name in measured}
    for name, rows in comparisons.items():
        if rows:
            print()
            print_rows("comparison", [{**row, "method": name, "perplexity": row[name]} for row in rows])
    figures = {"settings": content["settings"], "points": content["points"], "comparisons": comparisons}
    write_results(options.json, "frontier", figures)


if __name__ == "__main__":
    main()
