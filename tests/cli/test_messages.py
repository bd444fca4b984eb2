"""Errors on the command line name options, and every option that the table names exists."""

import argparse

import pytest
from support.command_line import bad
from support.saved_models import save_dense, save_text

from slicegpt.cli import main
from slicegpt.cli.messages import EVERYWHERE, OPTIONS, message_of, option_of
from slicegpt.errors import SliceGPTError, renamed
from slicegpt.recipe import NAMES


def help_of(command: str, capsys) -> str:
    words = command.split()
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", OPTIONS)
def test_the_table_names_options_of_the_command(command, capsys):
    shown = help_of("bench slicing" if command == "bench" else command, capsys)
    for options in OPTIONS[command].values():
        for option in options.split(", "):
            assert option in shown, option


def test_every_choice_of_a_recipe_is_an_option_of_slice(capsys):
    shown = help_of("slice", capsys)
    options = argparse.Namespace(command="slice")
    for name in NAMES:
        assert option_of(name, options) in shown, name


def test_options_in_the_place_of_arguments():
    options = argparse.Namespace(command="finetune", learning_rate=1.0)
    for argument, expected in (
        ("learning_rate", "--learning-rate: must be above 0"),  # called as the option is
        ("folder", "DIR: must be above 0"),  # in the command's table
        ("path", "--json: must be above 0"),  # in everybody's
        ("beta", "beta: must be above 0"),  # no option has it
        (None, "must be above 0"),
    ):
        assert message_of(SliceGPTError("must be\nabove 0", argument), options) == expected
    assert set(EVERYWHERE) == {"path", "spec", "documents", "names"}


def test_errors_carry_the_argument():
    error = SliceGPTError("must be 3, got 4", "width")
    assert (str(error), error.reason, error.argument) == (
        "width: must be 3, got 4",
        "must be 3, got 4",
        "width",
    )
    assert (str(SliceGPTError("broken")), SliceGPTError("broken").argument) == ("broken", None)
    with pytest.raises(SliceGPTError, match=r"^params: must be 3, got 4$") as caught, renamed(width="params"):
        raise error
    assert caught.value.__cause__ is error
    with pytest.raises(SliceGPTError, match=r"^width") as caught, renamed(height="params"):
        raise error
    assert caught.value is error


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["slice", "m", "--output", "o"],
            "--keep, --slice, --target-bytes, --target-speedup, --widths: one of keep, ",
        ),
        (["slice", "--slice", "0.1", "--output", "o"], "MODEL: is needed here or in a recipe, got none"),
        (["slice", "--recipe", "no.toml", "--output", "o"], "--recipe: cannot read no.toml: No such file"),
        (["slice", "m", "--recipe", "no.json", "--output", "o"], "--recipe: must be a .toml or .yaml file"),
        (["slice", "m", "--keep", "2", "--output", "o"], "--keep: must lie in (0, 1], got 2.0"),
        (
            ["slice", "m", "--slice", "0", "--calibration", "none", "--output", "o"],
            "--calibration: none is no",
        ),
        (
            ["slice", "m", "--slice", "0", "--calibration", "a:b", "--output", "o"],
            "--calibration: the weight",
        ),
        (["eval", "m", "--data", "none"], "--data: none is no file or folder"),
        (["frontier", "m", "--data", "none"], "--data: none is no file or folder"),
        (["frontier", "m", "--data", "a,a"], "--data: every name must be given once"),
        (["frontier", "m", "--data", "a", "--seed", "1", "--method", "x"], "--method: must be among ours, "),
        (["finetune", "m", "--data", "none", "--output", "o"], "--data: none is no file or folder"),
        (["finetune", "m", "--data", "python-reference", "--output", "o"], "DIR: m is not a folder that"),
        (["push", "none", "u/n"], "DIR: none is no folder"),
        (["demo", "--keep", "1.5"], "--keep: must lie in (0, 1], got 1.5"),
    ],
)
def test_what_the_commands_say(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = bad(capsys, *arguments)
    assert line.startswith(f"slicegpt {arguments[0]}: error: {message}"), line
    assert not list(tmp_path.iterdir())


def test_a_recipe_with_a_wrong_key(capsys, tmp_path):
    (tmp_path / "r.toml").write_text("nsamples = 'many'\n")
    line = bad(capsys, "slice", "m", "--recipe", tmp_path / "r.toml", "--output", tmp_path / "o")
    assert f"--recipe: {tmp_path / 'r.toml'}: nsamples: must be a whole number, got 'many'" in line


def test_json_that_cannot_be_written(folder, capsys, tmp_path):
    line = bad(capsys, "info", folder, "--json", tmp_path / "no" / "info.json")
    assert "--json: cannot write" in line


def test_old_name_of_activation_storage(folder, documents, capsys, tmp_path):
    """`--signals` still works, and the help does not show it."""
    assert "--signals" not in help_of("slice", capsys)
    text = save_text(tmp_path / "text.txt", documents)
    command = [
        "slice",
        str(folder),
        "--slice",
        "0.25",
        "--round-to",
        "4",
        "--nsamples",
        "4",
        "--seqlen",
        "16",
    ]
    more = ["--calibration", str(text), "--output", str(tmp_path / "out"), "--signals", "host"]
    assert main([*command, *more, "--no-refit"]) == 0
    with pytest.raises(SystemExit):
        main([*command, *more[:-1], "tape"])


def test_demo(folder, documents, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    text = save_text(tmp_path / "text.txt", documents)
    options = ["--model", str(folder), "--data", str(text), "--keep", "0.95", "0.9", "--json"]
    small = ["--nsamples", "8", "--seqlen", "32", "--windows", "2", "--output", str(tmp_path / "demo")]
    assert main(["demo", *options, str(tmp_path / "demo.json"), *small]) == 0
    assert "dense" in capsys.readouterr().out
    report = (tmp_path / "demo/report.md").read_text()
    assert "95 %" in report
    assert "90 %" in report
    assert (tmp_path / "demo/demo.svg").is_file()
    assert (tmp_path / "demo/keep-0.9/recipe.toml").is_file()
