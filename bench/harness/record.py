"""Results as JSON and CSV, with the environment they were measured in: machine, versions, commit, date, command."""

import csv
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from slicegpt.checkpoint.record import versions
from slicegpt.errors import SliceGPTError
from slicegpt.table import check_writable, write_json


def cpu_name() -> str:
    """The processor's model name, where the operating system reports one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ from it; "unknown" outside a checkout."""
    done = _run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).resolve().parent
    )
    return done or "unknown"


def driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    found = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0] if found else None


# An absolute path's folders, from the root or a home directory.
_FOLDERS = re.compile(r"(?<![\w./])(?:~\w*)?/(?:[^/\s,:'\"]+/)+")


def without_folders(value):
    """Text, or a list or mapping of it, with absolute paths cut to their last part: results are read elsewhere."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    return value


def _run(command: list[str], **options) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: torch.device | None = None) -> dict:
    """Device, versions, commit, date and command of this process.

    Args:
        device: the device measured on; None is the GPU where there is one.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    extra = {"cuda": torch.version.cuda}
    with suppress(ImportError):
        import triton

        extra["triton"] = triton.__version__
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": driver() if on_gpu else None,
        "threads": torch.get_num_threads(),
        # Above the number of threads used here, other work was running.
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions() | extra,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": without_folders(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }


def ceilings() -> dict[str, float] | None:
    """What the device reached in the same run: the figures of the file that SLICEGPT_CEILINGS names, None without.

    Raises:
        SliceGPTError: the file is not one that `slicegpt.bench.kernels.ceilings` wrote.
    """
    file = os.environ.get("SLICEGPT_CEILINGS")
    if not file:
        return None
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))["rows"]
        return {f"{row['ceiling']}, {row['unit']}": row["value"] for row in rows if row["value"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SliceGPTError(
            f"SLICEGPT_CEILINGS: expected a file of slicegpt.bench.kernels.ceilings, got {file}"
        ) from error


def beside() -> dict:
    """What stands beside every result: the ceilings of the same run, where they were measured."""
    found = ceilings()
    return {} if found is None else {"ceilings": found}


def write_results(file: str | None, name: str, figures: dict) -> None:
    """Write `figures` of the benchmark `name` with their environment as JSON; does nothing where `file` is None."""
    if file:
        about = {"benchmark": name, "environment": environment(), **beside()}
        write_json(file, {**about, **figures})


def write_csv(file: str | Path, rows: Sequence[Mapping], where: Mapping) -> None:
    """Rows as CSV, each with the device, driver, versions, commit, date and command, so that files can be concatenated.

    A row's own "device" takes precedence.
    """
    marks = {name: where[name] for name in ("device", "driver", "commit", "date", "command")}
    known = ("slicegpt", "python", "torch", "transformers", "triton", "cuda")
    marks |= {name: where["versions"].get(name) for name in known}
    columns = list(dict.fromkeys([*(name for row in rows for name in row), *marks]))
    temporary = Path(file).with_name(f".{Path(file).name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows({**marks, **row} for row in rows)
        os.replace(temporary, file)
    except OSError as error:
        raise SliceGPTError(f"--csv: cannot write {file}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Record:
    """The results of one run. Its files hold what was measured so far, marked `"complete": false` until the run ends.

    Attributes:
        content: of the JSON file.
    """

    def __init__(
        self,
        benchmark: str,
        settings: Mapping,
        device: torch.device,
        json_file: str | None = None,
        csv_file: str | None = None,
    ):
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        self.json_file, self.csv_file = json_file, csv_file
        self.content: dict = {
            "benchmark": benchmark,
            "complete": False,
            "environment": environment(device),
            "settings": without_folders(settings),
            **beside(),
            "rows": [],
        }

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    def save(self, **figures) -> None:
        """Merge these figures into the content and write the files."""
        self.content |= figures
        if self.json_file:
            write_json(self.json_file, self.content)
        if self.csv_file and self.rows:
            write_csv(self.csv_file, self.rows, self.content["environment"])

    def finish(self) -> None:
        self.save(complete=True)
