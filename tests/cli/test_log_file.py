"""`--log-file` on every command: stages, notices, warnings and errors with timestamps."""

import argparse
import logging
import re
import warnings

from support.command_line import bad
from support.saved_models import save_dense, save_text

from slicegpt.cli import build_parser, main
from slicegpt.cli.log_file import log, logged

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "


def commands(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands, and of the commands of a command."""
    found = {name: parser} if name else {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice, below in action.choices.items():
                found |= commands(below, f"{name} {choice}".strip())
    return found


def test_every_command_has_it():
    found = commands(build_parser())
    assert {"slice", "eval", "env", "bench slicing"} <= found.keys()
    for name, parser in found.items():
        assert "--log-file FILE" in parser.format_help(), name
    for place in (["bench", "--log-file", "x", "token"], ["bench", "token", "--log-file", "x"]):
        assert build_parser().parse_args(place).log_file == "x"


def test_run_is_logged(tmp_path, tiny_tokenizer, documents, capsys):
    folder = save_dense(tmp_path / "model", tiny_tokenizer)
    text = save_text(tmp_path / "text.txt", documents)
    file = tmp_path / "run.log"
    evaluate = ["eval", str(folder), "--data", str(text), "--seqlen", "32", "--log-file", str(file)]
    assert main([*evaluate, "--max-windows", "3"]) == 0
    lines = file.read_text(encoding="utf-8").splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    said = [re.sub(STAMP, "", line) for line in lines]
    assert re.fullmatch(r"slicegpt \S+: eval .*--max-windows 3", said[0])
    assert any(line.startswith("perplexity: 3 windows in ") for line in said)
    assert said[-1] == "done"
    # A second run is added, and its error, as the terminal has it.
    line = bad(capsys, *evaluate, "--text-column", "no")
    again = file.read_text(encoding="utf-8").splitlines()
    assert again[: len(lines)] == lines
    assert again[-1].endswith(line.removeprefix("slicegpt eval: "))


def test_file_that_cannot_be_written_is_told_first(tmp_path, capsys):
    for file in (tmp_path, tmp_path / "no" / "run.log"):
        line = bad(capsys, "eval", "nosuch", "--data", "nosuch", "--log-file", file)
        assert f"--log-file: cannot write {file}: " in line


def test_notices_and_warnings(tmp_path):
    file, logger = tmp_path / "run.log", logging.getLogger("slicegpt.ops")
    before = warnings.showwarning
    with logged(str(file), verbose=False), warnings.catch_warnings(record=False):
        warnings.simplefilter("always")
        logger.info("a notice")
        logger.debug("which kernel")
        warnings.showwarning("two\nlines", UserWarning, "file.py", 1)
        log("a line")
    logger.warning("outside")
    said = [re.sub(STAMP, "", line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert said == ["a notice", "warning: two lines", "a line"]
    assert warnings.showwarning is before
