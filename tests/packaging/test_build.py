"""setup.py: what it builds where, from which environment variables, and how it fails."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.builds import (
    ROOT,
    environment,
    evaluate,
    needs_backend,
    needs_compiler,
    needs_sources,
    stand_in,
    wheel,
    without_nvcc,
)

pytestmark = needs_sources


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
def test_kept_objects_serve_what_they_were_compiled_from(tmp_path, machine):
    """Named after source, headers, flags and nvcc; one that is there is linked, the others are compiled and added."""
    env = machine(None, "75 90", SLICEGPT_OBJECTS=str(tmp_path / "kept"), TORCH_CUDA_ARCH_LIST="9.0a")
    name = "str(kept_object(SOURCES / 'gram_fp64.cu', {!r}, {!r}))"
    first, again, flags, release = evaluate(
        *(
            name.format(*pair)
            for pair in [("-O3", "13.0"), ("-O3", "13.0"), ("-O2", "13.0"), ("-O3", "13.1")]
        ),
        env=env,
    )
    assert first == again
    assert len({first, flags, release}) == 3
    description = "ninja_file(find_nvcc(), '1', Path('build'), Path('target'))"
    (text,) = evaluate(description, env=env)
    kept = re.search(r"build/selection\.o (\S+/kept/selection-\w+\.o)\.part", text)[1]
    Path(kept).write_bytes(b"")
    (text,) = evaluate(description, env=env)
    assert "build build/selection.o" not in text
    assert re.search(rf"build target: link .*{kept}", text)
    assert "build build/gram_fp64.o" in text
    plain = {name: value for name, value in env.items() if name != "SLICEGPT_OBJECTS"}
    assert "keep =" not in evaluate(description, env=plain)[0]
