"""What a program uses in a process of its own, whose peak of memory is nobody else's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_and_measure(program: str, *arguments: str) -> list[int]:
    """The whole numbers that a Python program prints, such as `slicegpt.bench.harness.memory.peak_bytes`."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(number) for number in done.stdout.split()]
