"""The help of every command: each option's default, two examples that parse; names and defaults shared by commands."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest

from slicegpt.cli import build_parser
from slicegpt.cli.options import SHARED, byte_size, shard_size
from slicegpt.cli.parser import Parser, add_option, default_text
from slicegpt.cli.slicing import recipe_from
from slicegpt.errors import SliceGPTError


def parsers(parser, name="slicegpt"):
    """Every parser below one, by its command; those that only hold others are left out."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return {name: parser}
    found = {}
    for command, child in groups[0].choices.items():
        found |= parsers(child, f"{name} {command}")
    return found


COMMANDS = parsers(build_parser())
OPTIONS = [
    pytest.param(command, action, id=f"{command} {action.option_strings[0]}")
    for command, parser in COMMANDS.items()
    for action in parser._actions
    if action.option_strings and action.help != argparse.SUPPRESS
]


def test_every_command_is_found():
    assert {
        "slicegpt slice",
        "slicegpt demo",
        "slicegpt bench token",
        "slicegpt bench report",
    } <= COMMANDS.keys()


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_the_help_names_the_default(command, action):
    """Of every option that takes a value and need not be given; of a flag, that it is one."""
    assert action.help, "no help"
    shown = COMMANDS[command]._get_formatter()._expand_help(action)
    if action.required or (action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)):
        return
    assert "default" in shown
    on_off = isinstance(action, argparse.BooleanOptionalAction)  # of two words one is "(default)", too
    if action.default not in (None, argparse.SUPPRESS, []) and not (on_off and "(default)" in shown):
        assert default_text(action) in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_two_examples_that_parse(command):
    parser = COMMANDS[command]
    shown = parser.format_help()
    examples = [line.strip() for line in shown.partition("examples:\n")[2].splitlines() if line.strip()]
    assert examples == list(parser.examples)
    assert len(examples) >= 2
    for example in examples:
        assert len(example) <= 98
        assert example.startswith(command)
        words = shlex.split(example)
        parsed = build_parser().parse_args(words[1:])
        assert parsed.command == words[1]


# Where a command's default is another than the table's, and why.
OWN = {
    ("slicegpt eval", "--batch-size"): 1,  # the published protocol's
    ("slicegpt finetune", "--batch-size"): 1,  # beside gradients and an optimizer
    ("slicegpt finetune", "--seqlen"): 1024,
    ("slicegpt finetune", "--nsamples"): None,  # all of the text
    ("slicegpt frontier", "--windows"): (32,),  # dozens of points
    ("slicegpt demo", "--nsamples"): 24,  # minutes
    ("slicegpt demo", "--seqlen"): 512,
    ("slicegpt demo", "--windows"): 8,
    ("slicegpt bench token", "--batch-size"): 1,  # sequences that are decoded, not samples
    ("slicegpt bench layers", "--batch-size"): 1,
    ("slicegpt bench predict", "--batch-size"): 1,
    ("slicegpt bench throughput", "--seqlen"): 128,
    ("slicegpt bench predict", "--seqlen"): 128,
    ("slicegpt bench slicing", "--calibration"): "python-reference",  # for its time, whatever it says
    ("slicegpt bench predict", "--device"): "h200",  # on paper
}


@pytest.mark.parametrize("name", SHARED)
def test_the_same_defaults_everywhere(name):
    """`slice` leaves out of the namespace what is not given; its help shows the recipe's, which are the table's."""
    for command, parser in COMMANDS.items():
        action = parser._option_string_actions.get(name)
        if action is None:
            continue
        expected = OWN.get((command, name), SHARED[name].get("default"))
        default = action.default
        if default == argparse.SUPPRESS:
            assert command == "slicegpt slice"
            shown = default_text(action)
            assert shown == ("none" if expected is None else str(expected)), (command, name)
        else:
            assert default == ([expected] if isinstance(default, list) else expected), (command, name)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("slice m --output o --params 0.9", "keep", 0.9),
        ("demo --params 0.9 0.8", "keep", [0.9, 0.8]),
        ("eval m --max-windows 3", "windows", 3),
        ("bench token --shape llama-1b --batch 4", "batch", 4),
        ("bench token --shape llama-1b --batch-size 4", "batch", 4),
        ("bench predict --length 64", "length", 64),
    ],
)
def test_former_names(line, name, value):
    words = line.split()
    assert getattr(build_parser().parse_args(words), name) == value
    former = next(
        word for word in words if word.startswith("--") and word != "--output" and word != "--shape"
    )
    command = next(own for own in COMMANDS if line.startswith(own.removeprefix("slicegpt ")))
    if former != "--batch-size":
        assert not re.search(rf"{former}\b(?!-)", COMMANDS[command].format_help())


def test_both_names_of_one_size(capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args(["slice", "m", "--output", "o", "--params", "0.9", "--keep", "0.8"])
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_parser_of_its_own():
    """Flags, lists and numbers as they would be typed; `default` in the words is the last word on it."""
    parser = Parser(prog="x", epilog="Some words.", examples=("x --a 1",))
    add_option(parser, "--a", type=float, default=0.5, help="of 100 %% all", former=["--old"])
    parser.add_argument("--b", nargs="+", default=[1, 2], help="numbers")
    parser.add_argument("--c", action=argparse.BooleanOptionalAction, default=True, help="on or off")
    parser.add_argument("--d", help="something (default: what is there)")
    parser.add_argument("--e", default=["f", "g"], help="list")
    shown = " ".join(parser.format_help().split())
    for text in ("of 100 % all (default: 0.5)", "(default: 1 2)", "(default: on)", "list (default: f,g)"):
        assert text in shown
    assert shown.count("what is there") == 1
    assert shown.endswith("Some words. examples: x --a 1")
    assert (
        Parser(epilog="a:  1\nbb: 2", examples=["x"])
        .format_help()
        .endswith("a:  1\nbb: 2\n\nexamples:\n  x\n")
    )
    assert "--old" not in shown
    assert parser.parse_args(["--old", "3"]).a == 3


def test_sizes_on_the_command_line():
    parse = build_parser().parse_args
    sized = ["slice", "m", "--output", "o", "--target-bytes"]
    assert recipe_from(parse([*sized, "400MB"])).target_bytes == 400e6
    for bad in ("nan", "400XB", "0"):
        with pytest.raises(
            SliceGPTError, match="target_bytes: must be a number of bytes such as 400e6 or 400MB"
        ):
            recipe_from(parse([*sized, bad]))
    assert (
        parse(["bench", "throughput", "--shape", "llama-1b", "--max-memory", "8GiB"]).max_memory == 8 * 2**30
    )
    assert byte_size("1.5e9") == 1.5e9
    assert shard_size("5GB") == "5000000KB"
    assert shard_size("1MiB") == "1048KB"
    for bad in ("0", "-1", "five", "5XB", "", "1e999"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number of bytes such as 400MB"):
            byte_size(bad)
    with pytest.raises(argparse.ArgumentTypeError, match="must be 1 kB at least"):
        shard_size("10")


@pytest.mark.parametrize("command", [name.split()[1:] for name in COMMANDS])
def test_no_help_imports_torch(command):
    code = (
        "import sys; from slicegpt.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
