"""The command line: `slicegpt COMMAND`, one module a command.

Everything is imported inside functions: `main` answers Ctrl-C before it imports anything, and a command imports torch
only when it has checked what it can check without.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from slicegpt.cli import interrupts

if TYPE_CHECKING:
    import argparse


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported before a command runs."""
    from slicegpt import __version__
    from slicegpt.cli import (
        benchmark,
        completion,
        demo,
        env,
        evaluation,
        exporting,
        finetune,
        frontier,
        generation,
        info,
        publishing,
        serving,
        slicing,
    )
    from slicegpt.cli.log_file import CommandParser
    from slicegpt.cli.parser import Parser

    parser = Parser(
        prog="slicegpt",
        description="Compress language models by deleting rows and columns (SliceGPT, ICLR 2024).",
        examples=(
            "slicegpt slice smollm2-135m --keep 0.9 --calibration python-reference --output small",
            'slicegpt generate small --prompt "The for statement is" --runtime fused',
        ),
    )
    parser.add_argument("--version", action="version", version=f"slicegpt {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log which kernels were chosen, and why")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for command in (
        slicing,
        finetune,
        evaluation,
        generation,
        info,
        exporting,
        frontier,
        serving,
        publishing,
        benchmark,
        env,
        demo,
    ):
        command.add_parser(commands)
    completion.add_parser(commands, parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for bad input (one line on stderr), or 130 when interrupted.

    Args:
        arguments: those of the process where not given; the process is then taken for the command's own, and SIGINT is
            answered in its name.
    """
    if arguments is None:
        interrupts.install()
    try:
        return _run(arguments)
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not interrupts.received():
            raise
        interrupts.ignore()
        from slicegpt.cli.sharing import is_silent

        if not is_silent():
            print(interrupts.message(), file=sys.stderr)
        return interrupts.EXIT_CODE


def _run(arguments: list[str] | None) -> int:
    import shlex

    from slicegpt import __version__
    from slicegpt.cli import log_file, sharing
    from slicegpt.cli.messages import message_of
    from slicegpt.errors import SliceGPTError

    options = _parsed(arguments)
    log_file.configure(options.verbose)
    try:
        sharing.check(options)
        file = None if sharing.is_silent() else getattr(options, "log_file", None)
        with log_file.logged(file, options.verbose):
            log_file.log(
                f"slicegpt {__version__}: {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
            )
            try:
                options.run(options)
            except BaseException as error:
                text = message_of(error, options) if isinstance(error, SliceGPTError) else repr(error)
                log_file.log(f"error: {text}")
                raise
            log_file.log("done")
    except SliceGPTError as error:
        if interrupts.received():
            raise
        if not sharing.is_silent():
            print(f"slicegpt {options.command}: error: {message_of(error, options)}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; of several processes, one prints usage and help."""
    import contextlib
    import io

    from slicegpt.cli.sharing import is_silent

    with contextlib.ExitStack() as silence:
        if is_silent():
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return build_parser().parse_args(arguments)
