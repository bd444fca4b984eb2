"""`backend`: the CUDA launchers on what can run them here.

The sources of csrc/ are compiled for the host against tests/csrc/emulation, as for three compute capabilities, and take
CPU tensors; with a GPU the same tests also run on the installed `slicegpt._C`.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slicegpt.ops.cuda import extension
from slicegpt.ops.cuda import gram as cuda_gram

ROOT = Path(__file__).resolve().parents[2]
# Hidden: the three modules must not share their inline functions and variables.
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-U_FORTIFY_SOURCE",
]
# Token blocks of gram_exact and partial sums of gram_fp64 so short that a hundred tokens make several.
PLANE_BYTES = 128 * 12 * 64
SMALL_BLOCKS = ["-DSLICEGPT_PROMOTE_TOKENS=32"]


@pytest.fixture(scope="session")
def emulated_build(tmp_path_factory):
    """A function from a compute capability (75, 80, 90) to the module with every kernel compiled as for it.

    Its second argument is gram_exact's limit for a token block.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the host emulation needs a C++ compiler")
    root = tmp_path_factory.mktemp("emulated")
    includes = [
        ROOT / "tests" / "csrc" / "emulation",
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    common = [compiler, *FLAGS, *SMALL_BLOCKS, *(f"-I{path}" for path in includes)]
    common += ['-DSLICEGPT_VERSION="emulated"', '-DSLICEGPT_NVCC="none"', '-DSLICEGPT_ARCHITECTURES="host"']
    bindings = root / "bindings.o"

    def compile_one(source: Path, target: Path, arch: int, *defines: str) -> Path:
        if not target.exists():
            command = [*common, f"-DSLICEGPT_ARCH={arch}0", *defines]
            command += ["-x", "c++", "-c", source, "-o", target]
            subprocess.run(command, check=True)
        return target

    def build(arch: int, plane_bytes: int = PLANE_BYTES):
        folder = root / f"sm_{arch}"
        folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(compile_one, ROOT / "csrc" / "bindings.cpp", bindings, arch)]
            for source in (ROOT / "csrc").glob("*.cu"):
                # The one file that reads the limit; the others are compiled once for all limits.
                depends = source.stem == "gram_exact"
                target = folder / (f"{source.stem}-{plane_bytes}.o" if depends else f"{source.stem}.o")
                define = f"-DSLICEGPT_PLANE_BYTES={plane_bytes}"
                jobs.append(pool.submit(compile_one, source, target, arch, *([define] if depends else [])))
            objects = [job.result() for job in jobs]
        library = folder / f"{plane_bytes}" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        library.parent.mkdir(exist_ok=True)
        subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
        # pybind11 keeps one module for each name.
        spec = importlib.util.spec_from_file_location(f"emulated_sm_{arch}_{plane_bytes}._C", library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return build


# 75 and 90 take different instructions and fragment shapes everywhere, 80 in float64 (csrc/mma.cuh).
@pytest.fixture(scope="session", params=["sm_75", "sm_90", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request):
    """A compute capability, and the module to run on: None for the installed one on a GPU."""
    if request.param == "cuda":
        if not extension.is_available():
            pytest.skip(extension.why_not())
        return torch.cuda.get_device_capability(), None
    arch = int(request.param.removeprefix("sm_"))
    return divmod(arch, 10), request.getfixturevalue("emulated_build")(arch)


class Backend:
    """Runs `slicegpt.ops.cuda.gram.gram_<precision>` on copies of CPU tensors that keep their strides."""

    def __init__(self, device: str, capability: tuple[int, int]) -> None:
        self.device = device
        self.capability = capability

    def gram(self, precision, C, X, weight=None, **options):
        """C + Xᵀ diag(weight) X; the arguments stay as they are."""
        result = self._move(C)
        launcher = getattr(cuda_gram, f"gram_{precision}")
        launcher(result, self._move(X), None if weight is None else weight.to(self.device), **options)
        return result.cpu()

    def has_wgmma(self) -> bool:
        return extension.call("gram_exact_has_wgmma", torch.empty(0, device=self.device))

    def _move(self, matrix):
        # The whole storage travels, so that what surrounds a view (NaNs in the tests) is there too.
        whole = matrix.as_strided((matrix.untyped_storage().nbytes() // matrix.element_size(),), (1,), 0)
        return (
            whole.clone().to(self.device).as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())
        )


@pytest.fixture
def backend(target, monkeypatch):
    capability, module = target
    if module is None:
        return Backend("cuda", capability)
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(extension, "on_device", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(extension, "current_stream", lambda tensor: 0)
    monkeypatch.setattr(extension, "device_index", lambda tensor: 0)
    return Backend("cpu", capability)
