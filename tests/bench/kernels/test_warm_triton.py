"""Compiling ahead of time: the launchers' own launches, into Triton's cache, where a second call finds them."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def run(cache, *arguments: str) -> str:
    command = [sys.executable, "-m", "slicegpt.bench.kernels.warm_triton", "--shape", "smollm2-135m"]
    command += ["--slice", "0", "--target", "80", *arguments]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_launches_are_compiled_once(tmp_path):
    """Of one process among two: a product and its row scale, where there is one; the digest is the parent's."""
    one = ("--only", "attention out, 0 %, 32 rows", "--processes", "1")
    first = run(tmp_path, *one)
    assert "key " in first.splitlines()[0]
    assert first.count("attention out, 0 %, 32 rows") == 1
    compiled = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(compiled) == 1
    assert run(tmp_path, *one, "--part", "0").count("attention out") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == compiled
