"""setup.py: what it builds where, from which environment variables, and how it fails."""

import ast
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
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


def documents():
    """Files of docs/ and examples/, and the documents at the root."""
    folders = [path for name in ("docs", "examples") for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [*folders, *ROOT.glob("*.md"), *ROOT.glob("mkdocs.yml")]
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def environment(**changes):
    """This process's environment without the variables that setup.py reads, then `changes`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("SLICEGPT_CUDA", "SLICEGPT_CPU", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX")
    }
    return kept | changes


def without_nvcc(**changes):
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())
    kept = {k: v for k, v in environment().items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    return kept | {"PATH": path} | changes


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


def stand_in(file, script):
    """An executable shell script; returns the file."""
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


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


@needs_backend
def test_architectures():
    texts = ["8.0", "7.5;9.0a;9.0+PTX", " 7.5  9.0a, 9.0+PTX ", "Turing;8.0 8.0", "10.0+PTX"]
    one, several, spaced, named, ptx = evaluate(*(f"parse_architectures({text!r})" for text in texts))
    assert one == [("compute_80", "sm_80")]
    # sm_90 beside sm_90a would serve no other GPU; its PTX serves newer ones.
    assert several == [("compute_75", "sm_75"), ("compute_90a", "sm_90a"), ("compute_90", "compute_90")]
    assert spaced == several
    assert named == [("compute_75", "sm_75"), ("compute_80", "sm_80")]
    assert ptx == [("compute_100", "sm_100"), ("compute_100", "compute_100")]


@needs_backend
@pytest.mark.parametrize("text", ["80", "8.0;sm_90", "8.0+ptx", "six"])
def test_architectures_that_are_none(text):
    message = evaluate(f"parse_architectures({text!r})")
    wrong = text.split(";")[-1]
    expected = 'expected items like "8.0", "9.0a" or "9.0+PTX"'
    assert message == f"slicegpt: TORCH_CUDA_ARCH_LIST: {expected}, got {wrong!r}"


@needs_backend
def test_architectures_too_old():
    """Left out, unless nothing else is asked for."""
    assert evaluate("parse_architectures('5.2 7.0 8.0')") == [[("compute_80", "sm_80")]]
    message = evaluate("parse_architectures('7.0')").splitlines()[-1]
    assert message == "slicegpt: TORCH_CUDA_ARCH_LIST: 7.5 is the oldest supported architecture, got '7.0'"


@needs_backend
def test_default_architectures_are_those_nvcc_knows(tmp_path):
    old = stand_in(tmp_path / "nvcc", "printf 'compute_75\\ncompute_80\\ncompute_86\\n'")
    default = "parse_architectures(DEFAULT_ARCHITECTURES)"
    all_codes, old_codes = evaluate(
        f"[code for _, code in {default}]", f"[code for _, code in known_to({str(old)!r}, {default})]"
    )
    assert all_codes == DEFAULT_CODES
    assert old_codes == ["sm_75", "sm_80", "sm_86"]


ALL_KNOWN = "75 80 86 87 89 90 100 103 120"
DEFAULT_CODES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "compute_90"]


@needs_backend
@pytest.mark.parametrize(
    ("capabilities", "known", "variables", "codes"),
    [
        ("9.0", ALL_KNOWN, {}, ["sm_90a"]),
        ("8.6\\n8.0\\n8.6\\n", ALL_KNOWN, {}, ["sm_80", "sm_86"]),
        # A later minor version runs the machine code of an earlier one; a later major version needs PTX.
        ("10.3", "75 80 90 100", {}, ["sm_100"]),
        ("12.0", "75 80 90", {}, ["compute_90"]),
        # Too old, or no longer known to nvcc.
        ("7.0", ALL_KNOWN, {}, []),
        ("7.5", "80 90 100", {}, []),
        ("7.0\\n8.9", ALL_KNOWN, {}, ["sm_89"]),
        # No GPU, no driver, a driver that cannot say.
        ("", ALL_KNOWN, {}, []),
        (None, ALL_KNOWN, {}, []),
        ("[N/A]", ALL_KNOWN, {}, []),
        # What is asked for does not depend on the GPUs.
        (None, ALL_KNOWN, {"SLICEGPT_CUDA": "1"}, DEFAULT_CODES),
        ("8.9", ALL_KNOWN, {"SLICEGPT_CUDA": "1"}, DEFAULT_CODES),
        (None, "75 80", {"SLICEGPT_CUDA": "1"}, ["sm_75", "sm_80"]),
        (None, ALL_KNOWN, {"TORCH_CUDA_ARCH_LIST": "8.0+PTX"}, ["sm_80", "compute_80"]),
        ("9.0", ALL_KNOWN, {"TORCH_CUDA_ARCH_LIST": "8.0", "SLICEGPT_CUDA": "1"}, ["sm_80"]),
    ],
)
def test_which_gpus_are_compiled_for(machine, capabilities, known, variables, codes):
    env = machine(capabilities, known, **variables)
    (found,) = evaluate("[code for _, code in wanted_architectures(find_nvcc())]", env=env)
    assert found == codes


@needs_backend
@pytest.mark.parametrize(
    ("capabilities", "variables", "line"),
    [
        ("8.9", {}, "slicegpt: building the CUDA part for sm_89"),
        (
            None,
            {},
            "slicegpt: building without the CUDA part: no GPU is visible; set SLICEGPT_CUDA=1 "
            "(all supported GPUs) or TORCH_CUDA_ARCH_LIST to build it",
        ),
        (
            "7.0",
            {},
            "slicegpt: building without the CUDA part: nvcc cannot compile for the GPUs here "
            "(compute capability 7.0); set SLICEGPT_CUDA=1 (all supported GPUs) or TORCH_CUDA_ARCH_LIST to build it",
        ),
        ("8.9", {"SLICEGPT_CUDA": "0"}, "slicegpt: building without the CUDA part"),
        (None, {"TORCH_CUDA_ARCH_LIST": "8.0"}, "slicegpt: building the CUDA part for sm_80"),
    ],
)
def test_one_line_says_what_is_built(machine, capabilities, variables, line):
    env = machine(capabilities, ALL_KNOWN, **variables)
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [text for text in done.stderr.splitlines() if "CUDA part" in text] == [line]


@needs_backend
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLICEGPT_CUDA": "yes"}, "slicegpt: SLICEGPT_CUDA must be 0, 1 or auto, got 'yes'"),
        (
            {"SLICEGPT_CUDA": "1"},
            "slicegpt: SLICEGPT_CUDA=1 needs nvcc, but there is none in CUDA_HOME/bin or on PATH",
        ),
        ({"SLICEGPT_CPU": "2"}, "slicegpt: SLICEGPT_CPU must be 0, 1 or auto, got '2'"),
        (
            {"SLICEGPT_CPU": "1", "CXX": "/nowhere/c++ -O1"},
            "slicegpt: SLICEGPT_CPU=1 needs a C++ compiler, but there is none in CXX or on PATH",
        ),
    ],
)
def test_failures_are_one_line(variables, message):
    env = without_nvcc(**variables)
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == message


@needs_backend
def test_jobs():
    assert evaluate("jobs()", env=environment(MAX_JOBS="3")) == [["-j", "3"]]
    assert evaluate("jobs()") == [[]]
    message = evaluate("jobs()", env=environment(MAX_JOBS="0"))
    assert message == "slicegpt: MAX_JOBS must be a positive whole number, got '0'"


@needs_backend
def test_wheel_without_nvcc(tree):
    """All modules, the kernels' tuned configurations and the type marker; no results, documents or tests."""
    (tree / "kernels" / "tuned_sm90.json").write_text("{}")
    names, file = wheel(tree, without_nvcc(SLICEGPT_CPU="0"))
    assert not any("_C" in name or "_cpu." in name for name in names)
    assert file.name.endswith("py3-none-any.whl")
    assert modules_of("kernels") | modules_of("bench") <= names
    assert "slicegpt/ops/cuda.py" in names
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


@needs_backend
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="has no such instructions")
def test_a_compiler_before_amx(tmp_path):
    """Its files are compiled without their flags, to kernels that are not there; nothing else changes."""
    compiler = stand_in(tmp_path / "c++", 'case "$*" in *-mamx*) exit 1;; esac\nexec c++ "$@"')
    text, usual = evaluate(
        f"cpu_ninja_file({str(compiler)!r}, '0', Path('build'), Path('target'))",
        "cpu_ninja_file('c++', '0', Path('build'), Path('target'))",
        env=without_nvcc(),
    )
    differing = [
        (one, other) for one, other in zip(text.splitlines(), usual.splitlines(), strict=True) if one != other
    ]
    assert [one.split(" = ")[0].strip() for one, _ in differing] == ["cxx", "set"]
    assert "-mamx-bf16" in differing[1][1]
    assert differing[1][0].strip() == "set ="
    for name in ("amx", "avx512_bf16"):
        command = [str(compiler), "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"csrc/cpu/{name}.cpp"]
        assert subprocess.run(command, cwd=ROOT).returncode == 0


@needs_backend
@pytest.mark.parametrize("wish", ["auto", "1"])
def test_a_compiler_that_fails(tree, tmp_path, wish):
    """auto installs without the CPU part, and says so; 1 fails."""
    compiler = stand_in(tmp_path / "c++", "echo no such flag >&2\nexit 1")
    env = without_nvcc(CXX=str(compiler), SLICEGPT_CPU=wish)
    if wish == "auto":
        names, _ = wheel(tree, env)
        assert not any("_cpu." in name for name in names)
        return
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    message = "slicegpt: compiling csrc/cpu/ failed (see above); SLICEGPT_CPU=0 installs without the CPU part"
    assert done.stderr.strip().splitlines()[-1] == message


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


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
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


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_script_needs_a_folder_and_a_device(tmp_path):
    script = ["bash", ROOT / "bench" / "gpu.sh"]
    assert subprocess.run(script, capture_output=True).returncode == 2
    env = environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([*script, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench/gpu.sh: torch finds no CUDA device\n"
