"""Runs of `slice` in processes that are killed in the middle of a write: a worker that forks for each.

    python killed_runs.py < {"arguments": {...}, "kills": [[n, ...], ...]}

For each entry of `kills`: the n-th write since the start of the process is cut in half, and the process killed there;
the run is resumed, and killed again at the next n, until it is left alone. Prints, one JSON line an entry, the output
folder, the exit codes, the stage of the newest snapshot after each kill, and of the process that was left alone its
writes, and the number of them after each snapshot with the snapshot's stage.
A fork takes a tenth of a second; importing torch takes ten.
"""

import json
import os
import signal
import sys
import warnings

import torch

from slicegpt import api
from slicegpt.checkpoint.kept_run import RunKeeper, newest_state
from slicegpt.checkpoint.partial import is_resumable
from slicegpt.checkpoint.tensor_files import TensorFiles

write = TensorFiles._write
writes = 0


def cut_off(last: int | None):
    """A `TensorFiles._write` whose call `last` writes a half, and is the last thing that this process does."""

    def counted(handle, data, at):
        global writes
        writes += 1
        if writes == last:
            write(handle, data[: len(data) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
        write(handle, data, at)

    return staticmethod(counted)


def forked(arguments: dict, last: int | None) -> tuple[int, dict]:
    """Exit status of a run; and its writes and snapshots where it was left alone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        TensorFiles._write = cut_off(last)
        snapshots = []

        def noted(self, snapshot):
            write_snapshot(self, snapshot)
            snapshots.append([writes, stage(arguments["output"])])

        write_snapshot, RunKeeper._write = RunKeeper._write, noted
        resume = is_resumable(arguments["output"])
        api.slice(**arguments, resume=resume, keep_state="always", device="cpu")
        os.write(writing, json.dumps({"writes": writes, "snapshots": snapshots}).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return os.waitstatus_to_exitcode(status), json.loads(stream.read() or "{}")


def stage(output: str) -> str:
    """Stage of the newest snapshot; "none" before the first."""
    state = newest_state(output)
    if state is None:
        return "none"
    return "ridge" if "losses" in state["journal"] else state["stage"]


def main() -> None:
    job = json.load(sys.stdin)
    for index, kills in enumerate(job["kills"]):
        arguments = job["arguments"] | {"output": f"{job['arguments']['output']}-{index}"}
        codes, stages = [], []
        for last in kills:
            codes.append(forked(arguments, last)[0])
            stages.append(stage(arguments["output"]))
        code, facts = forked(arguments, None)
        result = {
            "output": arguments["output"],
            "codes": [*codes, code],
            "stages": stages,
            **facts,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
