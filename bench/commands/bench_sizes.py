"""What a model keeps and gains at some sizes: bytes, perplexity, zero-shot accuracy, tokens/s, minutes to slice.

    python -m slicegpt.bench.commands.bench_sizes MODEL --sizes 0.9,0.8 --calibration TEXT:4,self:1 --data TEST.txt \\
        --tasks piqa,arc_easy --limit 200 --json sizes.json

The dense model stands first. Slices and quality are measured in float32, one size after the other; then the runtime
generates with all of them in turns, so that other load meets each alike. Tasks on local files: --include-path.
"""

import argparse
import copy
import time

import torch
from transformers import PreTrainedModel

from slicegpt import api
from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import check_writable, write_results
from slicegpt.modeling.sizes import describe_neurons
from slicegpt.progress import Progress
from slicegpt.runtime.speed import tokens_per_second

PROMPT = "The quick brown fox jumps over the lazy dog and then it"


def measure(
    model: PreTrainedModel, tokenizer, tasks, options: argparse.Namespace, progress: Progress
) -> dict:
    """Stored bytes, perplexity, and the accuracy of each task."""
    found = api.evaluate(
        model,
        tokenizer=tokenizer,
        data=options.data,
        seqlen=options.eval_seqlen,
        max_windows=options.windows,
        tasks=tasks,
        batch_size=options.batch_size,
        progress=progress,
    )
    row = {
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "perplexity": found.perplexity.perplexity,
    }
    for score in found.zero_shot.scores if found.zero_shot else ():
        row[score.task] = score.reported
    return row


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--sizes", default="0.9,0.8", metavar="F,...", help="of all parameters (0.9,0.8)")
    parser.add_argument("--calibration", required=True, metavar="DATA[:W],...")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512, help="of a calibration sample (512)")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--data", required=True, metavar="DATA", help="text for the perplexity")
    parser.add_argument("--eval-seqlen", type=int, default=2048, help="tokens of a window (2048)")
    parser.add_argument("--windows", type=int, help="only the first N windows")
    parser.add_argument("--tasks", metavar="NAMES", help="of lm-eval, between commas")
    parser.add_argument("--include-path", metavar="DIR", help="folder of further task definitions")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="that are timed (64)")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def main() -> None:
    options, progress = parsed(), Progress()
    check_writable("--json", options.json)
    sizes = [float(size) for size in options.sizes.split(",")]
    tasks = None
    if options.tasks:
        from slicegpt.evaluation.zero_shot import ZeroShotTasks

        tasks = ZeroShotTasks(options.tasks.split(","), options.include_path, None, options.limit)
    dense, tokenizer = api.load(options.model, "float32")
    models, rows = [dense], [{"size": 1.0} | measure(dense, tokenizer, tasks, options, progress)]
    for size in sizes:
        start = time.perf_counter()
        model, _, report = api.slice(
            dense,
            tokenizer=tokenizer,
            keep=size,
            calibration=options.calibration,
            nsamples=options.nsamples,
            seqlen=options.seqlen,
            round_to=options.round_to,
            timing=False,
            progress=progress,
        )
        seconds = time.perf_counter() - start
        row = {"size": size, "width": model.config.boundary_widths[0]}
        row["neurons"] = describe_neurons(report.record["neurons"])
        row |= measure(model, tokenizer, tasks, options, progress) | {"slicing_seconds": seconds}
        models.append(model)
        rows.append(row)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for dtype in (torch.float32, torch.bfloat16):
        held = [copy.deepcopy(model).to(dtype) for model in models]
        for row, speed in zip(rows, tokens_per_second(held, ids, options.tokens, options.turns), strict=True):
            row[f"tokens_per_second_{str(dtype).removeprefix('torch.')}"] = speed
    print_rows("sizes", rows)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_results(options.json, "sizes", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
