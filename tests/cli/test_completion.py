"""`slicegpt completion`: the scripts in the shells that they are for."""

import argparse
import shutil
import subprocess

import pytest

from slicegpt.cli import build_parser, main
from slicegpt.cli.completion import SCRIPTS, commands_of

needs = {shell: pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}") for shell in SCRIPTS}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Each script in a file."""
    folder = tmp_path_factory.mktemp("completion")
    commands = commands_of(build_parser())
    for shell, script in SCRIPTS.items():
        (folder / shell).write_text(script(commands))
    return folder


def output_of(shell: str, code: str) -> list[str]:
    done = subprocess.run([shell, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split()


def in_bash(scripts, *words: str) -> set[str]:
    """What bash offers for the last of these words, through the function that `complete` names."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"""
source {scripts / "bash"}
function=$(complete -p slicegpt | sed -E 's/.* -F ([^ ]+) slicegpt$/\\1/')
COMP_WORDS=(slicegpt {line}); COMP_CWORD={len(words)}
"$function" slicegpt
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return set(output_of("bash", code))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sl"], {"slice"}),
        (["bench", "to"], {"token"}),
        (["--ver"], {"--version", "--verbose"}),
        (["--verbose", "ge"], {"generate"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["slice", "model", "--dt"], {"--dtype"}),
        (["slice", "model", "--dtype", ""], {"auto", "float32", "float16", "bfloat16"}),
        (["slice", "model", "--dtype", "=", "bf"], {"bfloat16"}),
        (["slice", "model", "--dtype", "="], {"auto", "float32", "float16", "bfloat16"}),
        (["generate", "slice", "--runtime", "f"], {"fused"}),
        (["slice", "--output", ""], set()),  # files, which bash completes
        (["slice", "mod"], set()),
        (["slice", "--signa"], {"--signal"}),  # and not its neighbour, which is hidden
    ],
)
@needs["bash"]
def test_bash(scripts, words, offered):
    assert in_bash(scripts, *words) == offered


@needs["bash"]
def test_bash_knows_every_option(scripts):
    """Against what argparse knows."""

    def parsers(parser, words=()):
        yield words, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    yield from parsers(child, (*words, name))

    for words, parser in parsers(build_parser()):
        flags = {
            flag
            for action in parser._actions
            if action.help != argparse.SUPPRESS
            for flag in action.option_strings
        }
        assert in_bash(scripts, *words, "-") == flags, words


@needs["bash"]
def test_files_where_there_is_no_word(scripts):
    """`-o default` is what makes bash complete file names there."""
    (line,) = [output_of("bash", f"source {scripts / 'bash'}; complete -p slicegpt")]
    assert line[:3] == ["complete", "-o", "default"]


@needs["fish"]
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("slicegpt sli", {"slice"}),
        ("slicegpt bench to", {"token"}),
        ("slicegpt slice m --dtype bf", {"bfloat16"}),
        ("slicegpt generate m --runtime f", {"fused"}),
        ("slicegpt generate m --max-n", {"--max-new-tokens"}),
        ("slicegpt completion z", {"zsh"}),
    ],
)
def test_fish(scripts, line, offered, tmp_path):
    code = f"cd {tmp_path}; source {scripts / 'fish'}; complete -C '{line}' | string split -f1 \\t; true"
    assert set(output_of("fish", code)) == offered


@needs["zsh"]
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sl"], "command slice"),
        (["bench", "to"], "command token"),
        (["slice", "m", "--dtype", ""], "compadd -- auto float32 float16 bfloat16"),
        (["slice", "m", "--output", ""], "files"),
        (["slice", "m"], "files"),
        (["generate", "m", "--ru"], "option --runtime"),
    ],
)
def test_zsh(scripts, words, offered):
    """With stand-ins for the functions of its completion system, which print what they are given."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"""
compdef() {{ }}
_files() {{ print files }}
compadd() {{ print compadd "$@" }}
_describe() {{ [[ $1 == -o ]] && shift; local entry; for entry in "${{(@P)2}}"; do print "$1" "${{entry%%:*}}"; done }}
source {scripts / "zsh"}
words=(slicegpt {line}); CURRENT={len(words) + 1}
_slicegpt
"""
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert offered in done.stdout.splitlines()


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_command_prints_the_script(scripts, shell, capsys):
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == (scripts / shell).read_text()
