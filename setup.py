"""Builds the compiled parts through ninja; all metadata is in pyproject.toml.

`slicegpt._C`, the CUDA kernels, from csrc/ with nvcc; `slicegpt._cpu`, the CPU's kernels, from csrc/cpu/ with a
C++ compiler (Linux).

Environment variables:
  SLICEGPT_CUDA         auto (default): where nvcc is found, build the CUDA part for the GPUs of this machine, or for
                        TORCH_CUDA_ARCH_LIST; leave it out where there are neither. 1: build it for all supported
                        GPUs, or for TORCH_CUDA_ARCH_LIST; fail without nvcc. 0: leave it out
  SLICEGPT_CPU          auto (default): build the CPU part where a C++ compiler is found and succeeds; 1: fail without;
                        0: leave it out
  CXX                   the C++ compiler of the CPU part; else the first of c++, g++, clang++ on PATH
  TORCH_CUDA_ARCH_LIST  architectures as PyTorch writes them: "7.5;8.0;9.0a", "9.0+PTX", names such as "Hopper"
  SLICEGPT_OBJECTS      a folder of objects of the CUDA kernels from an earlier build: those compiled from the same
                        sources, with the same flags and nvcc, are linked as they are; the others are added to it
  MAX_JOBS              parallel compilations (default: the number of processors)
  CUDA_HOME, CUDA_PATH  the toolkit; else the nvcc on PATH
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"

# Machine code for each generation in use; 9.0a because wgmma needs it. The PTX is of plain compute_90: code for an
# "a" target runs on that one architecture only, so it is not what later GPUs can compile from.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0a;9.0+PTX"
OLDEST = 75  # Turing
NAMED_ARCHITECTURES = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0a;9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}

# One wheel serves every processor of an architecture: each file of kernels is compiled for its instruction set, and
# called where the processor has it. A compiler that knows no such instructions (GCC before 11, for the first) makes an
# empty object of the file.
AVX512_FLAGS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
X86_FLAGS = {
    "amx": f"{AVX512_FLAGS} -mavx512bf16 -mamx-tile -mamx-bf16",
    "avx512_bf16": f"{AVX512_FLAGS} -mavx512bf16 -mavx512vnni",
    "avx512": AVX512_FLAGS,
    "avx2": "-mavx2 -mfma -mf16c",
}

NEW_ON_X86 = ("amx", "avx512_bf16")


class BuildError(SystemExit):
    """One line on stderr and exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(f"slicegpt: {message}")


def parse_architectures(text: str) -> list[tuple[str, str]]:
    """`TORCH_CUDA_ARCH_LIST` as `(virtual, code)` pairs: ("compute_90a", "sm_90a"), ("compute_90", "compute_90")."""
    for name, value in NAMED_ARCHITECTURES.items():
        text = re.sub(rf"\b{name}\b", value, text)
    pairs: list[tuple[str, str]] = []
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise BuildError(
                f'TORCH_CUDA_ARCH_LIST: expected items like "8.0", "9.0a" or "9.0+PTX", got {item!r}'
            )
        major, minor, feature, ptx = match.groups()
        number = f"{major}{minor}{feature}"
        if int(major + minor) < OLDEST:
            # Container images set lists that reach back to Maxwell.
            print(f"slicegpt: leaving out architecture {item}, 7.5 is the oldest supported", file=sys.stderr)
            continue
        pairs.append((f"compute_{number}", f"sm_{number}"))
        if ptx:
            pairs.append((f"compute_{number}", f"compute_{number}"))
    if not pairs:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: 7.5 is the oldest supported architecture, got {text.strip()!r}"
        )
    # "9.0a;9.0+PTX" asks for sm_90 beside sm_90a: the same GPUs, so one of the two cubins would never be loaded.
    codes = {code for _, code in pairs}
    pairs = [pair for pair in pairs if f"{pair[1]}a" not in codes]
    return list(dict.fromkeys(pairs))


def listed_by(nvcc: Path) -> set[str]:
    """The architectures that this nvcc can compile for, such as "compute_90"."""
    return set(subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split())


def known_to(nvcc: Path, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the default architectures that this nvcc can compile for (older and newer toolkits lack some)."""
    listed = listed_by(nvcc)
    return [(virtual, code) for virtual, code in pairs if virtual.rstrip("af") in listed]


@cache
def gpu_capabilities() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs, such as "9.0", from nvidia-smi; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(sorted(set(re.findall(r"^\s*(\d+\.\d)\s*$", text, flags=re.MULTILINE)), key=float))


def architectures_of(nvcc: Path, capabilities: tuple[str, ...]) -> list[tuple[str, str]]:
    """What to compile for GPUs of these capabilities; empty where this nvcc has nothing that runs on them.

    Each gets the newest architecture that nvcc knows and the GPU supports: machine code runs on later GPUs of the same
    major version; PTX is compiled by the driver for those of a later one.
    """
    numbers = [int(name) for name in re.findall(r"compute_(\d+)\b", " ".join(sorted(listed_by(nvcc))))]
    pairs = []
    for capability in capabilities:
        number = int(capability.replace(".", ""))
        nearest = max((known for known in numbers if OLDEST <= known <= number), default=None)
        if nearest is None:
            continue
        if nearest // 10 == number // 10:
            target = "90a" if nearest == 90 else str(nearest)  # wgmma needs 9.0a
            pairs.append((f"compute_{target}", f"sm_{target}"))
        else:
            pairs.append((f"compute_{nearest}", f"compute_{nearest}"))
    return list(dict.fromkeys(pairs))


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH if set, else the one on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            return nvcc if nvcc.exists() else None
    found = shutil.which("nvcc")
    return Path(found) if found else None


def wish_of(variable: str) -> str:
    """0, 1 or auto."""
    wish = os.environ.get(variable, "auto").strip().lower() or "auto"
    if wish not in ("0", "1", "auto"):
        raise BuildError(f"{variable} must be 0, 1 or auto, got {wish!r}")
    return wish


def wanted_nvcc() -> Path | None:
    """The compiler to use, or None to leave the CUDA part out."""
    wish = wish_of("SLICEGPT_CUDA")
    if wish == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and wish == "1":
        raise BuildError("SLICEGPT_CUDA=1 needs nvcc, but there is none in CUDA_HOME/bin or on PATH")
    return nvcc


def wanted_architectures(nvcc: Path) -> list[tuple[str, str]]:
    """What to compile for: TORCH_CUDA_ARCH_LIST; else every default with SLICEGPT_CUDA=1; else this machine's GPUs."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        return parse_architectures(asked)
    if wish_of("SLICEGPT_CUDA") == "1":
        return known_to(nvcc, parse_architectures(DEFAULT_ARCHITECTURES))
    return architectures_of(nvcc, gpu_capabilities())


def find_compiler() -> str | None:
    """CXX (which may hold arguments), else the first C++ compiler on PATH."""
    named = os.environ.get("CXX", "").strip()
    if named:
        return named if shutil.which(shlex.split(named)[0]) else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def accepts(compiler: str, flags: str) -> bool:
    """Whether the C++ compiler knows these flags."""
    command = [*shlex.split(compiler), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def wanted_compiler() -> str | None:
    """The C++ compiler to use, or None to leave the CPU part out."""
    wish = wish_of("SLICEGPT_CPU")
    if wish == "0":
        return None
    if sys.platform != "linux":
        if wish == "1":
            raise BuildError(f"SLICEGPT_CPU=1: the CPU part is for Linux, got {sys.platform}")
        return None
    compiler = find_compiler()
    if compiler is None and wish == "1":
        raise BuildError("SLICEGPT_CPU=1 needs a C++ compiler, but there is none in CXX or on PATH")
    return compiler


def find_ninja() -> str:
    """The executable of the `ninja` package, else the one on PATH."""
    try:
        import ninja

        candidate = Path(ninja.BIN_DIR) / "ninja"
        if candidate.exists():
            return str(candidate)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if not found:
        raise BuildError(
            "the compiled parts need ninja: pip install ninja, or set SLICEGPT_CUDA=0 SLICEGPT_CPU=0"
        )
    return found


def jobs() -> list[str]:
    """ninja's -j from MAX_JOBS; ninja's own default otherwise."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return []
    if not text.isdecimal() or int(text) < 1:
        raise BuildError(f"MAX_JOBS must be a positive whole number, got {text!r}")
    return ["-j", text]


def kept_object(source: Path, flags: str, release: str) -> Path | None:
    """Where SLICEGPT_OBJECTS keeps this kernel's object: named after all that it depends on. None without the variable.

    Kernels know neither Python nor torch, so that an object serves every interpreter.
    """
    folder = os.environ.get("SLICEGPT_OBJECTS", "").strip()
    if not folder:
        return None
    digest = hashlib.sha256(f"{release} {flags}".encode())
    for file in (source, *sorted([*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h")])):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return Path(folder).resolve() / f"{source.stem}-{digest.hexdigest()[:16]}.o"


def ninja_file(nvcc: Path, version: str, build: Path, target: Path) -> str:
    """The build description: one object per .cu for all architectures, the bindings, one link with static cudart."""
    import pybind11

    pairs = wanted_architectures(nvcc)
    gencodes = " ".join(f"-gencode=arch={virtual},code={code}" for virtual, code in pairs)
    release = re.search(r"V(\d+\.\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    facts = {
        "SLICEGPT_VERSION": version,
        "SLICEGPT_NVCC": release.group(1) if release else "unknown",
        "SLICEGPT_ARCHITECTURES": ",".join(code for _, code in pairs),
    }
    defines = " ".join(f"'-D{name}=\"{value}\"'" for name, value in facts.items())
    includes = " ".join(f"-I{path}" for path in (pybind11.get_include(), _python_include()))
    cuflags = f"-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden {gencodes}"
    lines = [
        f"nvcc = {_escape(nvcc)}",
        f"cuflags = {cuflags}",
        "rule cuda",
        "  command = $nvcc $cuflags -MD -MF $out.d -c $in -o $out $keep",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        # Host code alone: nvcc runs the host compiler with its own include paths, and no device pass.
        "rule host",
        f"  command = $nvcc -std=c++17 -O2 -Xcompiler -fPIC,-fvisibility=hidden {includes} {defines} "
        "-MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = host $in",
        "rule link",
        "  command = $nvcc -shared -cudart static -Xcompiler -fPIC $in -o $out",
        "  description = link $out",
    ]
    objects = []
    for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]):
        rule = "cuda" if source.suffix == ".cu" else "host"
        obj = build / f"{source.stem}.o"
        kept = kept_object(source, cuflags, facts["SLICEGPT_NVCC"]) if rule == "cuda" else None
        if kept is not None and kept.exists():
            objects.append(_escape(kept))
            continue
        lines.append(f"build {_escape(obj)}: {rule} {_escape(source)}")
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            made, copy = (shlex.quote(str(path)).replace("$", "$$") for path in (obj, kept))
            lines.append(f"  keep = && cp {made} {copy}.part && mv {copy}.part {copy}")
        objects.append(_escape(obj))
    lines += [f"build {_escape(target)}: link {' '.join(objects)}", f"default {_escape(target)}", ""]
    return "\n".join(lines)


def cpu_ninja_file(compiler: str, version: str, build: Path, target: Path) -> str:
    """The build description of the CPU part: one object per .cpp, and one link.

    No OpenMP library is linked: torch has loaded one, see csrc/cpu/threads.h.
    """
    import pybind11

    includes = " ".join(f"-I{path}" for path in (pybind11.get_include(), _python_include()))
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    lines = [
        f"cxx = {compiler.replace('$', '$$')}",
        # Activations and rounding are loops over floats: no errno and no traps, so that they become vectors.
        "cxxflags = -std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
        f"{includes} '-DSLICEGPT_VERSION=\"{version}\"'",
        "rule object",
        "  command = $cxx $cxxflags $set -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
        "rule link",
        "  command = $cxx -shared $in -o $out -ldl",
        "  description = link $out",
    ]
    objects = []
    for source in sorted((SOURCES / "cpu").glob("*.cpp")):
        obj = _escape(build / f"{source.stem}.o")
        flags = X86_FLAGS.get(source.stem, "") if on_x86 else ""
        if source.stem in NEW_ON_X86 and not accepts(compiler, flags):
            flags = ""
        lines += [f"build {obj}: object {_escape(source)}", f"  set = {flags}"]
        objects.append(obj)
    lines += [f"build {_escape(target)}: link {' '.join(objects)}", f"default {_escape(target)}", ""]
    return "\n".join(lines)


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _python_include() -> str:
    import sysconfig

    return sysconfig.get_paths()["include"]


class Build(build_ext):
    """Runs ninja on csrc/; objects are kept between builds, so only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        version, target = self.distribution.get_version(), Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == "slicegpt._cpu":
            compiler = find_compiler()
            if compiler is None:
                raise BuildError("the C++ compiler vanished during the build")
            build = self.folder("cpu")
            if self.ninja(build, cpu_ninja_file(compiler, version, build, target)) == 0:
                return
            if not ext.optional:
                raise BuildError(
                    "compiling csrc/cpu/ failed (see above); SLICEGPT_CPU=0 installs without the CPU part"
                )
            # setuptools goes on without an optional extension.
            raise CompileError(
                "slicegpt: compiling csrc/cpu/ failed (see above): building without the CPU part"
            )
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("nvcc vanished during the build")
        build = self.folder("cuda")
        if self.ninja(build, ninja_file(nvcc, version, build, target)) != 0:
            raise BuildError(
                "compiling csrc/ failed (see above); SLICEGPT_CUDA=0 installs without the CUDA part"
            )

    def folder(self, name: str) -> Path:
        # Not self.build_temp: an editable install gives a new one every time.
        build = ROOT / "build" / name
        build.mkdir(parents=True, exist_ok=True)
        return build

    def ninja(self, build: Path, description: str) -> int:
        (build / "build.ninja").write_text(description)
        command = [find_ninja(), "-C", str(build), *(["-v"] if self.verbose > 1 else []), *jobs()]
        return subprocess.call(command)


def why_no_architecture() -> str:
    """Why SLICEGPT_CUDA=auto builds for no GPU although nvcc is there, and what to set instead."""
    found = ", ".join(gpu_capabilities())
    gpus = (
        f"nvcc cannot compile for the GPUs here (compute capability {found})"
        if found
        else "no GPU is visible"
    )
    return f"{gpus}; set SLICEGPT_CUDA=1 (all supported GPUs) or TORCH_CUDA_ARCH_LIST to build it"


def extensions() -> list[Extension]:
    found = []
    nvcc = wanted_nvcc()
    architectures = [] if nvcc is None else wanted_architectures(nvcc)
    if architectures:
        codes = ", ".join(code for _, code in architectures)
        print(f"slicegpt: building the CUDA part for {codes}", file=sys.stderr)
        found.append(Extension("slicegpt._C", sources=[]))
    elif nvcc is None:
        print("slicegpt: building without the CUDA part", file=sys.stderr)
    else:
        print(f"slicegpt: building without the CUDA part: {why_no_architecture()}", file=sys.stderr)
    if wanted_compiler() is None:
        print("slicegpt: building without the CPU part", file=sys.stderr)
    else:
        found.append(Extension("slicegpt._cpu", sources=[], optional=wish_of("SLICEGPT_CPU") == "auto"))
    return found


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
