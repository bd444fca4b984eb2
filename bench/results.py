"""Where a figure was measured: machine, versions, commit, date, command; and writing it beside its figures."""

import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch

from slicegpt.record import versions
from slicegpt.table import write_json


def cpu_name() -> str:
    """The processor's own name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def commit() -> str:
    """The checkout's commit, "-dirty" where tracked files differ from it, "unknown" outside one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def environment() -> dict:
    """Device, versions, commit, date and command of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_results(file: str | None, name: str, figures: dict) -> None:
    """Write `figures` under `name` with the environment they were measured in; nothing where `file` is None."""
    if file:
        write_json(file, {"benchmark": name, "environment": environment(), **figures})
