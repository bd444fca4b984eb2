"""What several ranks gain over one with as many threads, and that they give the same model.

    python -m slicegpt.bench.commands.bench_ranks smollm2-135m --ranks 2 --calibration wikitext2 --json ranks.json

Each run is a `slicegpt slice` under torchrun, started anew; the two kinds take turns. The seconds are those of the run
without the start of its processes. On a CPU a rank has `--threads` threads, and the one that it is compared with has
those of all ranks together; on GPUs every rank has a device, and one rank has one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from slicegpt.bench.harness.record import write_results
from slicegpt.errors import SliceGPTError
from slicegpt.table import format_table

SLICING = re.compile(r"^slicing: \d+ steps in ([\d.]+) s", re.MULTILINE)
# Text that the model writes is sampled within another stage.
STAGES = re.compile(r"^(?!sampling the model).*: \d+ [\w ]+ in ([\d.]+) s", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a rank, on a CPU (1)")
    parser.add_argument("--repeats", type=int, default=1, help="turns (1)")
    parser.add_argument("--params", type=float, default=0.8)
    parser.add_argument("--calibration", default="python-reference")
    parser.add_argument("--data", help="text of the perplexities (that of --calibration)")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=12, help="of the perplexities (12)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats):
            for ranks in (1, options.ranks):
                rows.append(measure(options, ranks, Path(folder) / f"{turn}-{ranks}"))
        outputs = [Path(folder) / f"0-{ranks}" for ranks in (1, options.ranks)]
        for row, output in zip(rows[:2], outputs, strict=True):
            row["perplexity"] = perplexity(options, output)
        apart = furthest_apart(*outputs)
    print(format_table(rows, list(dict.fromkeys(name for row in rows for name in row))))
    seconds = [min(row["in all"] for row in rows if row["ranks"] == ranks) for ranks in (1, options.ranks)]
    perplexities = [row["perplexity"] for row in rows[:2]]
    ratio = seconds[0] / seconds[1]
    print(
        f"{options.ranks} ranks: {ratio:.2f} times as fast as one; perplexity {perplexities[0]:.4f} and "
        f"{perplexities[1]:.4f}; weights at most {apart:.2g} apart, relative"
    )
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_results(
        options.json,
        "ranks",
        {"settings": settings, "rows": rows, "speedup": ratio, "weights_apart": apart},
    )


def run(options: argparse.Namespace, ranks: int, *arguments: object) -> str:
    """A command under torchrun in so many processes; what it printed on standard error."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    threads = options.threads * (options.ranks if ranks == 1 else 1)
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "slicegpt", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error: " in line), "no line says why")
        raise SliceGPTError(f"slicegpt {arguments[0]} with {ranks} ranks failed: {line}")
    return done.stderr


def measure(options: argparse.Namespace, ranks: int, output: Path) -> dict:
    """Slice once; seconds of its parts."""
    size = ["--params", options.params, "--round-to", options.round_to, "--batch-size", options.batch_size]
    text = ["--calibration", options.calibration, "--nsamples", options.nsamples, "--seqlen", options.seqlen]
    arguments = [options.model, "--output", output, *size, *text, "--device", options.device]
    printed = run(options, ranks, "slice", *arguments)
    seconds = json.loads((output / "slicing.json").read_text(encoding="utf-8"))["seconds"]
    return {
        "ranks": ranks,
        "slicing": float(SLICING.search(printed)[1]),
        **{
            name: seconds[name]
            for name in ("allocation", "prices", "trials", "ridge", "exchange")
            if name in seconds
        },
        "in all": sum(map(float, STAGES.findall(printed))),
    }


def perplexity(options: argparse.Namespace, output: Path) -> float:
    file = output.with_suffix(".json")
    data = ["--data", options.data or options.calibration, "--seqlen", options.seqlen]
    windows = ["--max-windows", options.windows, "--device", options.device, "--json", file]
    run(options, 1, "eval", output, *data, *windows)
    return json.loads(file.read_text(encoding="utf-8"))["perplexity"]


def furthest_apart(first: Path, second: Path) -> float:
    """The largest relative distance of a weight in one folder from that in the other, by Frobenius norms."""
    from safetensors.torch import load_file

    def weights(folder: Path) -> dict:
        return {
            name: w.double() for file in folder.glob("*.safetensors") for name, w in load_file(file).items()
        }

    one, two = weights(first), weights(second)
    return max(
        ((two[name] - one[name]).norm() / one[name].norm()).item() for name in one if one[name].numel()
    )


if __name__ == "__main__":
    main()
