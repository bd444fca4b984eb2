"""What wheels and source distributions hold."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from support.builds import (
    ROOT,
    environment,
    modules_of,
    needs_backend,
    needs_compiler,
    needs_nvcc,
    needs_sources,
    wheel,
    without_nvcc,
)

pytestmark = needs_sources


def documents():
    """Files of docs/ and examples/, and the documents at the root."""
    folders = [path for name in ("docs", "examples") for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [*folders, *ROOT.glob("*.md"), *ROOT.glob("mkdocs.yml")]
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


@needs_backend
def test_wheel_without_nvcc(tree):
    """All modules, the kernels' tuned configurations and the type marker; no results, documents or tests."""
    (tree / "kernels" / "tuned_sm90.json").write_text("{}")
    names, file = wheel(tree, without_nvcc(SLICEGPT_CPU="0"))
    assert not any("_C" in name or "_cpu." in name for name in names)
    assert file.name.endswith("py3-none-any.whl")
    assert modules_of("kernels") | modules_of("bench") <= names
    assert {"slicegpt/ops/cuda/extension.py", "slicegpt/ops/cpu/extension.py"} <= names
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    assert others == {"slicegpt/py.typed", "slicegpt/kernels/README.md", "slicegpt/kernels/tuned_sm90.json"}
    with zipfile.ZipFile(file) as archive:
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert "Project-URL: Paper, https://arxiv.org/abs/2401.15024" in text
    assert "Classifier: Typing :: Typed" in text


@needs_backend
@needs_nvcc
def test_wheel_with_nvcc(tree):
    """The wheel holds the module, which loads without a GPU; a second build compiles only what changed."""
    env = environment(SLICEGPT_CUDA="1", SLICEGPT_CPU="0", TORCH_CUDA_ARCH_LIST="8.0+PTX", MAX_JOBS="2")
    names, file = wheel(tree, env)
    (extension,) = [name for name in names if name.startswith("slicegpt/_C")]
    assert modules_of("kernels") | modules_of("bench") <= names

    with zipfile.ZipFile(file) as archive:
        archive.extract(extension, tree / "unpacked")
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(tree / 'unpacked' / extension)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.version(), module.nvcc_version(), *module.architectures())\n"
        # Linked statically, and the driver is opened only by the first CUDA call.
        "loaded = open('/proc/self/maps').read()\n"
        "assert 'libcudart' not in loaded and 'libcuda.so' not in loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    version, nvcc, *architectures = done.stdout.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert re.fullmatch(r"\d+\.\d+\.\d+", nvcc)
    assert architectures == ["sm_80", "compute_80"]

    ninja = importlib.import_module("ninja")
    plan = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(tree / "build" / "cuda"), "-n"]
    assert "no work to do" in subprocess.check_output(plan, text=True)
    changed = tree / "csrc" / "moduli.cuh"
    later = time.time() + 5
    os.utime(changed, (later, later))
    steps = subprocess.check_output(plan, text=True)
    rebuilt = set(re.findall(r"(\w+)\.cu$", steps, flags=re.MULTILINE))
    including = {path.stem for path in (tree / "csrc").glob("*.cu") if "moduli.cuh" in included_by(path)}
    assert len(including) > 1
    assert rebuilt == including


def included_by(source: Path) -> set[str]:
    """Headers of the source's folder that it includes, directly or through others."""
    names, waiting = set(), [source]
    while waiting:
        found = re.findall(r'#include "([^"]+)"', waiting.pop().read_text())
        waiting += [source.parent / name for name in found if name not in names]
        names.update(found)
    return names


@needs_backend
@needs_compiler
def test_wheel_with_the_cpu_part(tree):
    """Kernels for instruction sets that this machine may lack, without an OpenMP library of its own."""
    names, file = wheel(tree, without_nvcc(SLICEGPT_CPU="1", MAX_JOBS="2"))
    (extension,) = [name for name in names if name.startswith("slicegpt/_cpu.")]
    assert not any(name.startswith("slicegpt/_C.") for name in names)
    assert "py3-none-any" not in file.name
    with zipfile.ZipFile(file) as archive:
        archive.extract(extension, tree / "unpacked")
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cpu', {str(tree / 'unpacked' / extension)!r})\n"
        "try:\n"
        "    importlib.util.module_from_spec(spec)\n"
        "except ImportError as error:\n"
        "    assert 'GOMP' in str(error) or 'omp_' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('loaded without torch: where did its OpenMP library come from?')\n"
        "import torch\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.version(), *module.instruction_sets())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, *instruction_sets = done.stdout.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert instruction_sets[-1] == "portable"
    assert_loads_on_any_processor(tree / "build" / "cpu")


def assert_loads_on_any_processor(objects: Path) -> None:
    """What an object for newer processors shares with the others would be run on older ones as well.

    A weak function (an inline one or a template's) is taken from any object that has it, so the linker could take the
    one with AVX-512; constructors of static objects run when the module is loaded.
    """
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        return
    for name in ("avx2", "avx512", "avx512_bf16", "amx"):
        symbols = subprocess.check_output(["nm", objects / f"{name}.o"], text=True)
        weak = re.findall(r"^\S+ [WV] (\S+)$", symbols, re.MULTILINE)
        assert not [symbol for symbol in weak if not symbol.startswith("DW.ref.")], weak
        sections = subprocess.check_output(["readelf", "-SW", objects / f"{name}.o"], text=True)
        assert ".init_array" not in sections
        assert ".ctors" not in sections


@needs_backend
def test_sdist_carries_the_sources(tree):
    """With the documents, the examples and the recorded results, for those who build or test from it."""
    for name in documents():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, env=without_nvcc(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in sources}
    wanted |= documents() | {str(path.relative_to(ROOT)) for path in (ROOT / "bench").rglob("*.json")}
    assert wanted | modules_of("kernels") | modules_of("bench") | {"setup.py", "LICENSE"} <= names
