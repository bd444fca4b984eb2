"""The command line answers at once what needs no model, and Ctrl-C at any moment."""

import os
import signal
import subprocess
import sys

import pytest

from slicegpt.cli import benchmark_options

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and wait4")

# CPU seconds, user and system, and how often a command may be tried: other load slows one run or another.
BOUND, TRIES = 0.5, 5
HEAVY = ("torch", "transformers", "numpy")


@pytest.fixture
def sliced(tmp_path):
    """An output folder that is there, and a text."""
    (tmp_path / "there").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    return tmp_path


def cpu_seconds(command: list[str], cwd) -> tuple[float, int, str]:
    """CPU time of a child, its exit code, and what it printed."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    return usage.ru_utime + usage.ru_stime, process.returncode, printed


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("--help", 0, "usage: slicegpt"),
        ("--version", 0, "slicegpt "),
        ("slice --help", 0, "usage: slicegpt slice"),
        ("bench throughput --help", 0, "usage: slicegpt bench throughput"),
        ("nosuch", 2, "invalid choice: 'nosuch'"),
        ("slice nosuch --slice 2 --output x", 2, "--slice: "),
        ("slice nosuch.gguf --slice 0.2 --output x", 2, "nosuch.gguf does not exist"),
        ("slice nosuch --slice 0.2 --output x --calibration nofile", 2, "nofile is no file or folder"),
        ("eval nosuch --limit 3", 2, "--limit needs --tasks"),
        ("eval ./nosuch --data text.txt", 2, "./nosuch does not exist"),
        ("generate nosuch.gguf --prompt x", 2, "nosuch.gguf does not exist"),
        ("generate nosuch --prompt x --sample --top-p 2", 2, "--top-p: "),
        ("generate nosuch --prompt x --device tpu", 2, "--device: "),
        ("bench token", 2, "--model, --shape: "),
        ("bench token --shape llama-1b --json nowhere/x.json", 2, "--json: cannot write nowhere/x.json"),
        ("finetune nosuch --data text.txt --output x --rank 0", 2, "rank"),
        ("frontier nosuch --data text.txt --method best", 2, "'best'"),
        ("push nosuch user/name", 2, "nosuch is no folder"),
        ("info there", 2, "has no config.json"),
        ("completion bash", 0, "complete -o default -F _slicegpt slicegpt"),
        ("generate nosuch", 2, "--prompt: is needed, unless --chat is given"),
    ],
)
def test_answers_without_torch_in_half_a_second(sliced, arguments, code, expected):
    """CPU seconds, not seconds: the best of a few runs, since what else runs here slows a process, too."""
    seconds = []
    while not seconds or (min(seconds) > BOUND and len(seconds) < TRIES):
        # -X importtime says what is imported; it costs a few milliseconds.
        command = [sys.executable, "-X", "importtime", "-m", "slicegpt", *arguments.split()]
        spent, returned, printed = cpu_seconds(command, sliced)
        assert returned == code, printed
        imported = {line.split("|")[-1].strip() for line in printed.splitlines() if "import time:" in line}
        assert "slicegpt" in imported
        assert not imported & set(HEAVY)
        answer = [line for line in printed.splitlines() if not line.startswith("import time:")]
        assert expected in "\n".join(answer)
        seconds.append(spent)
    assert min(seconds) <= BOUND


def test_names_known_without_torch_are_those_of_the_benchmarks():
    from slicegpt.bench.models.architectures import MODELS
    from slicegpt.bench.models.devices import ALIASES
    from slicegpt.bench.models.engines import ENGINES

    assert set(ENGINES) == set(benchmark_options.ENGINES)
    assert set(MODELS) == set(benchmark_options.SHAPES)
    assert set(ALIASES) == set(benchmark_options.PAPER_DEVICES)


def test_method_names_known_without_torch():
    from slicegpt.cli import frontier
    from slicegpt.evaluation.frontier_run import KNOWN_METHODS

    assert frontier.METHODS == KNOWN_METHODS


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["argparse", "numpy", "torch.nn", "transformers.utils"])
def test_interrupted_while_importing(tmp_path, module):
    """SIGINT as soon as a module has been imported, from argparse to the depths of transformers."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "slicegpt", "env"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell started in the background have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if line.startswith("import time:") and line.split("|")[-1].strip() == module:
                break
        assert process.poll() is None, f"{module} is not imported"
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert printed == ""
    lines = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert lines == ["interrupted; nothing was written under the final name"]


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """As for a job in the background of a script."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from slicegpt.cli import main\n"
        "sys.argv = ['slicegpt', 'eval', 'nosuch', '--limit', '3']; code = main()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


def test_any_error_after_an_interrupt_is_its_consequence(tmp_path):
    """A library turns the KeyboardInterrupt into an error of its own: still one line and 130."""
    code = """
import os, signal, sys
from slicegpt.cli import main
import slicegpt.cli.evaluation
def run(options):
    from slicegpt.errors import SliceGPTError
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True: pass
    except KeyboardInterrupt:
        raise SliceGPTError("cannot load")
slicegpt.cli.evaluation.run = run
sys.argv = ["slicegpt", "eval", "nosuch", "--limit", "3"]
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        timeout=300,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted; nothing was written under the final name\n"
