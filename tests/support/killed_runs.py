"""`slice` runs in processes of their own that are killed in the middle of a write: a worker that forks for each.

    python killed_runs.py < {"arguments": {...}, "kills": [[n, ...], ...]} > results, one JSON line a run

Of every run: the n-th write since the start of a process is cut in half, and the process killed there; the run is then
resumed, and killed again at the next n, until it is left alone. A fork takes a tenth of a second, importing torch ten.
"""

import json
import os
import signal
import sys

import torch

from slicegpt import api
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


def forked(arguments: dict, resume: bool, last: int | None) -> tuple[int, int]:
    """Exit status of a run, and the writes that it took where it was left alone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        TensorFiles._write = cut_off(last)
        api.slice(**arguments, resume=resume, keep_state="always", device="cpu")
        os.write(writing, str(writes).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return os.waitstatus_to_exitcode(status), int(stream.read() or 0)


def main() -> None:
    job = json.load(sys.stdin)
    for index, kills in enumerate(job["kills"]):
        arguments = job["arguments"] | {"output": f"{job['arguments']['output']}-{index}"}
        codes, stages = [], []
        for last in [*kills, None]:
            output = arguments["output"]
            code, count = forked(arguments, is_resumable(output), last)
            codes.append(code)
        print(json.dumps({"output": output, "codes": codes, "writes": count}), flush=True)


if __name__ == "__main__":
    main()
