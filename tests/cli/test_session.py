"""A new user's first session at a terminal of 80 columns: demo, slice, info, eval, generate, benchmark, report."""

import copy
import importlib.util
import shlex
import sys

import pytest
from support.saved_models import save_dense, save_text

pytest.importorskip("pty", reason="needs a POSIX terminal")
from support.terminal import Session, run_in_terminal

COLUMNS = 80
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
# The peaks of this CPU from products and copies that take milliseconds, not seconds.
QUICK = """
import sys
from slicegpt.bench.models import devices
measure = devices.measured_cpu
devices.measured_cpu = lambda **options: measure(size=64, copy_bytes=1 << 20, **options)
from slicegpt.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_tokenizer, documents):
    """A folder with a dense model, whose tokenizer has a chat template, and a text."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    save_dense(folder / "dense", tokenizer, max_position_embeddings=256)
    save_text(folder / "text.txt", documents)
    return folder


def slicegpt(folder, arguments: str, answers: str = "") -> Session:
    """A command that must end well, within the terminal's width and without a traceback."""
    start = ["-c", QUICK] if arguments.startswith("bench token") else ["-m", "slicegpt"]
    session = run_in_terminal(
        [sys.executable, *start, *shlex.split(arguments)], folder, COLUMNS, answers=answers
    )
    assert session.code == 0, session.output
    assert "Traceback" not in session.output
    assert session.widest <= COLUMNS, [line for line in session.lines if len(line) > COLUMNS]
    return session


def test_demo(desk):
    pytest.importorskip("matplotlib")
    text = "--data text.txt --nsamples 8 --seqlen 32 --windows 2"
    session = slicegpt(desk, f"demo --model dense {text} --keep 0.9 0.8 --output shown")
    shown = "\n".join(session.lines)
    for column in ("runs in", "bytes", "perplexity", "tokens/s", "speed-up"):
        assert column in shown
    for model in ("dense: ", "90 %: ", "80 %: "):  # what each of them writes
        assert f"\n{model}" in shown
    for file in (
        "report.md",
        "report.html",
        "demo.svg",
        "token.json",
        "demo.json",
        "keep-0.8/model.safetensors",
    ):
        assert (desk / "shown" / file).exists(), file
    (proposed,) = session.next_commands
    assert proposed.startswith("slicegpt generate shown/keep-0.9 --prompt ")
    run_proposals(session, desk)


@pytest.fixture(scope="module")
def sliced(desk) -> Session:
    arguments = "--calibration text.txt --nsamples 8 --seqlen 32 --round-to 8 --output small"
    return slicegpt(desk, f"slice dense --params 0.8 {arguments}")


def test_slice(sliced, desk):
    assert "sliced" in "\n".join(sliced.lines)
    assert (desk / "small" / "model.safetensors").exists()
    run_proposals(sliced, desk)


def test_info_and_eval(sliced, desk):
    assert "of all parameters" in " ".join(slicegpt(desk, "info small").lines)
    session = slicegpt(desk, "eval dense small --data text.txt --seqlen 32 --max-windows 4")
    run_proposals(session, desk)
    assert "perplexity" in session.output


@pytest.mark.parametrize("runtime", ["plain", "fused"])
def test_generate(sliced, desk, runtime):
    # Few tokens: what the model writes is no line of ours to break.
    session = slicegpt(desk, f"generate small --prompt 'The for' --max-new-tokens 12 --runtime {runtime}")
    assert "".join(session.lines).strip()


@pytest.mark.skipif(
    importlib.util.find_spec("slicegpt.cli.chat") is None, reason="generate has no conversation"
)
def test_chat(sliced, desk):
    session = slicegpt(desk, "generate small --chat --max-new-tokens 6", "The for\nand while\n/exit\n")
    assert session.output.count("tokens/s") == 2


def test_benchmark_and_report(sliced, desk):
    (desk / "results").mkdir(exist_ok=True)
    options = "--engines hf,plain,fused --tokens 4 --prompt 4 --rounds 2 --round-to 8"
    session = slicegpt(desk, f"bench token --model dense small --slice 0 {options} --json results/token.json")
    shown = "\n".join(session.lines)
    assert "speed-up" in shown
    assert "Left out at this width" in shown  # 13 columns do not fit
    assert session.next_commands == ["slicegpt bench report results"]
    pytest.importorskip("matplotlib")
    run_proposals(session, desk)
    page = (desk / "results" / "report.html").read_text(encoding="utf-8")
    assert "Time per token: dense, small" in page


def run_proposals(session: Session, folder) -> None:
    """The commands that a command ends with can be run as they are."""
    for command in session.next_commands:
        program, arguments = command.split(" ", 1)
        assert program == "slicegpt"
        # What a model of random weights writes has no spaces to break at.
        short = " --max-new-tokens 12" if arguments.startswith("generate ") else ""
        slicegpt(folder, arguments + short)


def test_env_and_a_mistake(desk):
    slicegpt(desk, "env")
    session = run_in_terminal([sys.executable, "-m", "slicegpt", "info", "nosuch.gguf"], desk, COLUMNS)
    assert session.code == 2
    (line,) = [line for line in session.lines if line]
    assert line.startswith("slicegpt info: error: ")
    assert len(line) <= COLUMNS


def test_what_is_written_over_counts_for_the_width_and_not_for_the_lines():
    session = Session("50 %|#####\r100 %|##########\r\nnext: slicegpt info x\r\nend", 0)
    assert session.lines == ["100 %|##########", "next: slicegpt info x", "end"]
    assert session.widest == len("next: slicegpt info x")
    assert session.next_commands == ["slicegpt info x"]
