"""A Triton interpreter in a process of its own."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def interpreter():
    """`interpreter(module, function, *arguments, **options)`: what it returns, or the arguments as it left them."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    worker = subprocess.Popen(
        [sys.executable, root / "tests" / "support" / "interpreter_worker.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
    )

    def call(module: str, function: str, *arguments, **options):
        pickle.dump((module, function, arguments, options), worker.stdin)
        worker.stdin.flush()
        answer = pickle.load(worker.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    yield call
    worker.stdin.close()
    worker.wait(timeout=60)
