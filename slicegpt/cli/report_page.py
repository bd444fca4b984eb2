"""`slicegpt bench report`: the results of a folder as one page, or how far they are from those of another."""

import argparse

from slicegpt.table import check_writable, fit_text

from .benchmark_options import check_files


def add_report(benchmarks) -> None:
    parser = benchmarks.add_parser(
        "report",
        help="the results in a folder as one HTML page",
        description="Collects the JSON results below DIR into one self-contained page with plots (extra plot).",
        examples=(
            "slicegpt bench report results",
            "slicegpt bench report results --against bench/results/cpu",
        ),
    )
    parser.set_defaults(run=run_report)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--output", metavar="FILE", help="the page (default: DIR/report.html)")
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="instead of a page: how far the ratios in DIR and in OTHER are apart",
    )


def run_report(options: argparse.Namespace) -> None:
    from pathlib import Path

    from slicegpt.bench.report.page import render
    from slicegpt.bench.report.results import read_results

    check_files(options)
    results = read_results(options.folder)
    if options.against:
        print_agreement(results, read_results(options.against, "--against"), options)
        return
    output = options.output or str(Path(options.folder) / "report.html")
    check_writable("--output", output)
    Path(output).write_text(render(results), encoding="utf-8")
    print(f"{output}: {len(results)} results")


def print_agreement(first: list, second: list, options: argparse.Namespace) -> None:
    import statistics
    from pathlib import Path

    from slicegpt.bench.harness.display import print_rows
    from slicegpt.bench.harness.repeatability import compare_runs

    rows = compare_runs(first, second, (Path(options.folder), Path(options.against)))
    print_rows("agreement", rows)
    apart = [row["apart"] for row in rows]
    worst = max(rows, key=lambda row: row["apart"])
    told = (
        f"{len(rows)} ratios: {statistics.median(apart):.1%} apart in the median, at most {worst['apart']:.1%} "
        f"({worst['ratio of']}); {sum(value <= 0.1 for value in apart)} within 10 %."
    )
    print(fit_text(told))
