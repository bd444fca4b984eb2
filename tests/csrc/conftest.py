"""`emulated`: csrc/ compiled for the host against tests/csrc/emulation and loaded in the place of `slicegpt._C`."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slicegpt.ops import cuda

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]


def build_emulated(folder: Path, arch: int) -> Path:
    """The extension module with every kernel compiled by the host compiler as for compute capability `arch`."""
    import pybind11

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the host emulation needs a C++ compiler")
    includes = [ROOT / "tests" / "csrc" / "emulation", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [*FLAGS, *(f"-I{path}" for path in includes), f"-DSLICEGPT_ARCH={arch}"]
    flags += ['-DSLICEGPT_VERSION="emulated"', '-DSLICEGPT_NVCC="none"', f'-DSLICEGPT_ARCHITECTURES="sm_{arch // 10}"']

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    sources = sorted([*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cpp")])
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return library


# 75, 80 and 90 take different instructions and fragment shapes (csrc/mma.cuh).
@pytest.fixture(scope="session", params=[750, 800, 900], ids=["sm_75", "sm_80", "sm_90"])
def emulated_module(request, tmp_path_factory):
    library = build_emulated(tmp_path_factory.mktemp(f"emulated_{request.param}"), request.param)
    # The interpreter keys extension modules by name and file: three files, three modules.
    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulated_module, monkeypatch):
    """`slicegpt.ops.cuda` with its launchers on the host emulation: they take CPU tensors."""
    monkeypatch.setattr(cuda, "_C", emulated_module)
    monkeypatch.setattr(cuda, "_on_device", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_stream", lambda tensor: 0)
    return cuda
