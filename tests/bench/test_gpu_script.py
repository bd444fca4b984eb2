"""bench/gpu.sh, with a stand-in for Python."""

import shutil
import subprocess
import sys

import pytest
from support.builds import ROOT, environment, needs_sources, stand_in

pytestmark = [needs_sources, pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")]


def test_gpu_script_goes_on_after_a_failed_step(tmp_path):
    """bench/gpu.sh with a stand-in for Python: a failing build is reported, the other steps still run."""
    python = stand_in(
        tmp_path / "python",
        'case "$*" in *get_device_capability*) echo 8.0 ;; *setup.py*) echo no compiler; exit 1 ;; esac',
    )
    command = ["bash", ROOT / "bench" / "gpu.sh", tmp_path / "out"]
    done = subprocess.run(command, env=environment(PYTHON=str(python)), capture_output=True, text=True)
    assert done.returncode == 1
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    states = {line.split()[0]: line.split()[-1] for line in lines if line}
    assert states["build"] == "failed"
    assert states["tests"] == states["bench_gram"] == "ok"
    assert lines[-1].startswith("failed: build")
    assert "no compiler" in done.stdout
    assert "no compiler" in (tmp_path / "out" / "build.log").read_text()


def test_gpu_script_needs_a_folder_and_a_device(tmp_path):
    script = ["bash", ROOT / "bench" / "gpu.sh"]
    assert subprocess.run(script, capture_output=True).returncode == 2
    env = environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([*script, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench/gpu.sh: torch finds no CUDA device\n"
