"""A copy of the source tree, and machines with a toolkit and GPUs that are stand-ins."""

import os
import shutil

import pytest
from support.builds import ROOT, environment, stand_in


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, links kept as links."""
    target = tmp_path / "tree"
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("slicegpt", "kernels", "bench", "csrc"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def machine(tmp_path):
    """An environment with a toolkit and GPUs: `machine("9.0\n", "75 90")`; None: nvidia-smi fails, as without a driver.

    nvcc knows the given architectures and compiles nothing.
    """

    def build(capabilities, known, **variables):
        home = tmp_path / "toolkit"
        (home / "bin").mkdir(parents=True)
        listed = " ".join(f"compute_{number}" for number in known.split())
        stand_in(home / "bin" / "nvcc", f"echo {listed} | tr ' ' '\\n'")
        answer = "exit 9" if capabilities is None else f"printf '{capabilities}'"
        query = "--query-gpu=compute_cap --format=csv,noheader"
        stand_in(home / "nvidia-smi", f'[ "$*" = "{query}" ] || exit 2\n{answer}')
        path = f"{home}{os.pathsep}{os.environ['PATH']}"
        return environment(CUDA_HOME=str(home), PATH=path, SLICEGPT_CPU="0", **variables)

    return build
