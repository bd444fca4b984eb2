"""What the tests of the build share: setup.py in an environment of their choice, and stand-ins for its tools."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs a C++ compiler",
)
needs_backend = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "pybind11", "ninja", "pip")),
    reason="needs setuptools, pybind11, ninja and pip in this environment",
)


def evaluate(*expressions, env=None):
    """The values of expressions over setup.py's functions, or the line with which it exits.

    In a process of its own: setuptools must be imported before anything that imports the old distutils.
    """
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('script', 'setup.py')\n"
        "script = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(script)\n"
        "print([eval(expression, vars(script)) for expression in sys.argv[1:]])\n"
    )
    command = [sys.executable, "-c", code, *expressions]
    done = subprocess.run(command, cwd=ROOT, env=env or environment(), capture_output=True, text=True)
    if done.returncode:
        assert done.returncode == 1
        return done.stderr.strip()
    return ast.literal_eval(done.stdout)


def environment(**changes):
    """This process's environment without the variables that setup.py reads, then `changes`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k
        not in (
            "SLICEGPT_CUDA",
            "SLICEGPT_CPU",
            "SLICEGPT_OBJECTS",
            "TORCH_CUDA_ARCH_LIST",
            "MAX_JOBS",
            "CXX",
        )
    }
    return kept | changes


def without_nvcc(**changes):
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())
    kept = {k: v for k, v in environment().items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    return kept | {"PATH": path} | changes


def stand_in(file, script):
    """An executable shell script; returns the file."""
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def wheel(tree, env):
    """Builds a wheel of the tree; its names, and the file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        "dist",
        "-v",
    ]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist()), file


def modules_of(folder):
    return {f"slicegpt/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
