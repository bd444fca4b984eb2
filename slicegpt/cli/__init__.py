"""The command line: `slicegpt COMMAND`, one module a command."""

import argparse
import logging
import sys

from slicegpt.cli import (
    benchmark,
    demo,
    env,
    evaluation,
    finetune,
    frontier,
    generation,
    info,
    publishing,
    serving,
    slicing,
)
from slicegpt.cli.messages import message_of
from slicegpt.errors import SliceGPTError

COMMANDS = (
    slicing,
    finetune,
    evaluation,
    generation,
    info,
    frontier,
    serving,
    publishing,
    benchmark,
    env,
    demo,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported before a command runs."""
    from slicegpt import __version__

    parser = argparse.ArgumentParser(
        prog="slicegpt",
        description="Compress language models by deleting rows and columns (SliceGPT, ICLR 2024).",
    )
    parser.add_argument("--version", action="version", version=f"slicegpt {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log which kernels were chosen, and why")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for bad input (one line on stderr), or 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("slicegpt").setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    try:
        options.run(options)
    except SliceGPTError as error:
        print(f"slicegpt {options.command}: error: {message_of(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written under the final name", file=sys.stderr)
        return 130
    return 0
