"""`slicegpt demo`: the whole path on a real model, SmolLM2-135M, in a few minutes on two CPU cores."""

import argparse

from .options import add_json, positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="slice SmolLM2-135M at two sizes and compare",
        description="Slice SmolLM2-135M at two sizes on real text; compare perplexity, true size and time per token.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="models, plot and report (runs/demo)"
    )
    parser.add_argument("--model", default="smollm2-135m", help="any model that `slicegpt slice` takes")
    parser.add_argument("--data", default="python-reference", help="text to calibrate on, and its test split")
    parser.add_argument(
        "--params", type=float, nargs="+", default=[0.95, 0.85], metavar="F", help="sizes to reach"
    )
    parser.add_argument("--nsamples", type=positive, default=24)
    parser.add_argument("--seqlen", type=positive, default=512)
    parser.add_argument("--windows", type=positive, default=8, help="windows of --seqlen to evaluate")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from slicegpt.demo import run_demo

    run_demo(options)
