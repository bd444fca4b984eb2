"""`kill -9` at random moments of a run of slicing, each time resumed: are the weights those of an undisturbed run?

    python -m slicegpt.bench.commands.resume_kills --kills 20 --seed 7 --json resume_kills.json

One run is left alone, and timed. In others, so many kills each (`--kills-a-run`), the time is cut into equal parts, a
moment is drawn in each, and the process dies there; the next one resumes it. What is reported of a kill: the stage and
the blocks done that the newest snapshot holds, and how old that was: the work that is lost.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slicegpt.bench.harness.record import write_results
from slicegpt.checkpoint.kept_run import newest_state
from slicegpt.checkpoint.partial import STATE_FILES, is_resumable, partial_path
from slicegpt.progress import Progress
from slicegpt.table import check_writable, format_table

# Seconds between two looks at a process.
LOOK = 0.05


class Run:
    """`slicegpt slice` into a folder, in a process of its own.

    Attributes:
        begun: seconds from the start to the first snapshot, None where it died before.
        gap: the longest time between two snapshots.
    """

    def __init__(self, arguments: list[str], output: Path):
        resume = ["--resume"] if is_resumable(output) else []
        command = [sys.executable, "-m", "slicegpt", "slice", *arguments, "--output", str(output), *resume]
        self.output, self.gap, self.begun = output, 0.0, None
        self.known = {file.name for file in partial_path(output).glob(STATE_FILES)}
        self.start = self.last = time.monotonic()
        self.process = subprocess.Popen(
            [*command, "--keep-state", "always"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, seconds: float | None = None) -> bool:
        """Kill the process after so many seconds (None: never); whether it was still running then.

        Raises:
            RuntimeError: it ended by itself, and not well.
        """
        while self.process.poll() is None:
            now = time.monotonic()
            if seconds is not None and now - self.start >= seconds:
                self.process.kill()
                self.process.communicate()
                return True
            names = {file.name for file in partial_path(self.output).glob(STATE_FILES)}
            if names - self.known:
                if self.begun is None:
                    self.begun = now - self.start
                else:
                    self.gap = max(self.gap, now - self.last)
                self.known, self.last = self.known | names, now
            time.sleep(LOOK)
        if self.process.returncode:
            raise RuntimeError(self.process.stderr.read())
        return False


def weights_hash(folder: Path) -> str:
    """One hash of all of a model's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("model*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


def moments(seconds: float, kills: int, generator: random.Random) -> list[float]:
    """One moment in each of as many equal parts of a time."""
    return [seconds * (part + generator.random()) / kills for part in range(kills)]


def killed(arguments: list[str], output: Path, at: list[float], startup: float) -> list[dict]:
    """Kill a run into `output` at these moments of an undisturbed one, resume it each time, and finish it."""
    rows, before = [], 0.0
    for moment in at:
        # A resumed process stands, after its start, where the one before it was killed.
        run = Run(arguments, output)
        dead = run.wait(moment if not rows else startup + moment - before)
        before = max(moment, startup)
        if not dead:
            return rows
        state = newest_state(output)
        file = max(partial_path(output).glob(STATE_FILES), default=None)
        rows.append(
            {
                "killed after": round(moment, 2),
                "stage": "before the first" if state is None else stage_of(state),
                "blocks": 0 if state is None else state["done"],
                "lost": round(moment if file is None else time.time() - file.stat().st_mtime, 2),
            }
        )
        if output.exists() and not is_resumable(output):
            rows[-1]["stage"] = "finished"  # what was left was the end of the process
            return rows
    Run(arguments, output).wait()
    return rows


def stage_of(state: dict) -> str:
    """The stage that a snapshot is of; while λ is chosen it is the last one of slicing."""
    return "choice of λ" if "losses" in state["journal"] else state["stage"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-a-run", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--calibration", default="python-reference")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", metavar="DIR", help="where outputs are written (a temporary folder)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    check_writable("--json", options.json)
    arguments = [options.model]
    for name in ("keep", "round_to", "calibration", "nsamples", "seqlen", "device"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    progress, generator, rows = Progress(), random.Random(options.seed), []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        with progress.step("the run that is left alone"):
            alone = Run(arguments, Path(folder) / "alone")
            alone.wait()
            seconds = time.monotonic() - alone.start
        expected = weights_hash(alone.output)
        while len(rows) < options.kills:
            count = min(options.kills_a_run, options.kills - len(rows))
            output = Path(folder) / f"killed-{len(rows)}"
            at = moments(seconds, count, generator)
            with progress.step(f"a run that is killed at {', '.join(f'{moment:.1f}' for moment in at)} s"):
                found = killed(arguments, output, at, alone.begun)
            same = weights_hash(output) == expected
            rows += [row | {"same weights": same} for row in found]
            shutil.rmtree(output)
    print(format_table(rows, list(rows[0])))
    different = sum(not row["same weights"] for row in rows)
    print(
        f"{len(rows)} kills, {different} of them in runs that ended with other weights; an undisturbed run takes"
        f" {seconds:.1f} s, its first snapshot comes after {alone.begun:.1f} s, and at most {alone.gap:.1f} s lie"
        " between two"
    )
    facts = {"seconds": seconds, "first_snapshot": alone.begun, "longest_gap": alone.gap, "sha256": expected}
    write_results(options.json, "resume_kills", facts | {"seed": options.seed, "kills": rows})
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
