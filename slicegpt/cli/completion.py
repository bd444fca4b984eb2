"""`slicegpt completion`: a script that completes commands, options and their values in bash, zsh and fish.

Written from the parser itself, so that it knows every option that there is; nothing heavy is imported.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass

PROGRAM = "slicegpt"

_HOW = """\
bash: slicegpt completion bash > ~/.local/share/bash-completion/completions/slicegpt
zsh:  slicegpt completion zsh > DIR/_slicegpt, where DIR is in $fpath
fish: slicegpt completion fish > ~/.config/fish/completions/slicegpt.fish

"""


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        flags: as they are typed.
        about: its help, in one line.
        takes_value: a word follows it.
        values: the words that may follow, where these are known.
    """

    flags: tuple[str, ...]
    about: str
    takes_value: bool
    values: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command and what may follow it.

    Attributes:
        path: "" of the program itself, "/bench/token" of a command's command.
        commands: its own commands and what they do.
        words: known values of its positional arguments.
    """

    path: str
    options: tuple[Option, ...]
    commands: tuple[tuple[str, str], ...]
    words: tuple[str, ...]


def add_parser(commands, root: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "completion",
        help="a script that completes commands and options in the shell",
        description="Print a script that completes commands, options and their values.",
        epilog=_HOW,
        examples=("slicegpt completion bash", "slicegpt completion zsh"),
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS))
    parser.set_defaults(run=lambda options: print(SCRIPTS[options.shell](commands_of(root)), end=""))


def commands_of(parser: argparse.ArgumentParser, path: str = "") -> list[Command]:
    """A parser's commands, itself first. argparse has no public way to ask for its actions."""
    options, commands, words, below = [], [], [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = [(choice.dest, _line(choice.help)) for choice in action._choices_actions]
            for name, child in action.choices.items():
                below += commands_of(child, f"{path}/{name}")
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            values = tuple(map(str, action.choices or ()))
            options.append(
                Option(tuple(action.option_strings), _line(action.help), action.nargs != 0, values)
            )
        else:
            words += map(str, action.choices or ())
    return [Command(path, tuple(options), tuple(commands), tuple(words)), *below]


def _line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip().replace("%%", "%")


def _first(command: Command) -> list[str]:
    """What may stand where no option is begun."""
    return [*(name for name, _ in command.commands), *command.words]


def _patterns(words) -> str:
    return "|".join(map(shlex.quote, words))


def bash_script(commands: list[Command]) -> str:
    """A function in `COMPREPLY`'s protocol; what it leaves empty, bash completes with files."""
    cases = []
    for command in commands:
        lines = [f"    {shlex.quote(command.path)})", '        case "$previous" in']
        for option in command.options:
            if option.takes_value:
                words = shlex.quote(" ".join(option.values))
                lines.append(f"            {_patterns(option.flags)}) words={words} ;;")
        flags = " ".join(flag for option in command.options for flag in option.flags)
        first = shlex.quote(" ".join(_first(command)))
        lines += [
            f'            *) if [[ "$current" == -* ]]; then words={shlex.quote(flags)}; else words={first}; fi ;;',
            "        esac ;;",
        ]
        cases.append("\n".join(lines))
    known = _patterns(command.path for command in commands[1:])
    return f"""# bash completion of {PROGRAM}, written by: {PROGRAM} completion bash
_{PROGRAM}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}" chosen="" words="" word
    # --option=value comes as three words.
    if [[ "$current" == "=" ]]; then
        current=""
    elif [[ "$previous" == "=" ]]; then
        previous="${{COMP_WORDS[COMP_CWORD - 2]}}"
    fi
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD - 1}}"; do
        case "$chosen/$word" in
        {known}) chosen="$chosen/$word" ;;
        esac
    done
    case "$chosen" in
{chr(10).join(cases)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _{PROGRAM} {PROGRAM}
"""


def zsh_script(commands: list[Command]) -> str:
    """A completion function, to be sourced or found in `$fpath`."""
    cases = []
    for command in commands:
        lines = [f"    ({shlex.quote(command.path)})", '        case "$previous" in']
        for option in command.options:
            if option.takes_value:
                action = (
                    f"compadd -- {' '.join(map(shlex.quote, option.values))}" if option.values else "_files"
                )
                lines.append(f"            ({_patterns(option.flags)}) {action}; return ;;")
        flags = _described((flag, option.about) for option in command.options for flag in option.flags)
        first = _described([*command.commands, *((word, "") for word in command.words)])
        lines += [
            "        esac",
            f"        options=({flags})",
            f"        first=({first}) ;;",
        ]
        cases.append("\n".join(lines))
    known = _patterns(command.path for command in commands[1:])
    return f"""#compdef {PROGRAM}
# zsh completion of {PROGRAM}, written by: {PROGRAM} completion zsh
_{PROGRAM}() {{
    local previous="$words[CURRENT - 1]" chosen="" word
    local -a options first
    for word in "${{(@)words[2,CURRENT - 1]}}"; do
        case "$chosen/$word" in
        ({known}) chosen="$chosen/$word" ;;
        esac
    done
    case "$chosen" in
{chr(10).join(cases)}
    esac
    if [[ "$words[CURRENT]" == -* ]]; then
        _describe -o option options
    elif (( $#first )); then
        _describe command first
    else
        _files
    fi
}}
if [[ "$funcstack[1]" == _{PROGRAM} ]]; then
    _{PROGRAM} "$@"
else
    compdef _{PROGRAM} {PROGRAM}
fi
"""


def _described(pairs) -> str:
    """`'name:what it does'` for `_describe`, whose names end at the first colon."""
    return " ".join(shlex.quote(f"{name}:{about}" if about else name) for name, about in pairs)


def fish_script(commands: list[Command]) -> str:
    """`complete` for every option, with the condition that its command has been chosen."""
    lines = [
        f"# fish completion of {PROGRAM}, written by: {PROGRAM} completion fish",
        f"function __{PROGRAM}_at --description 'Whether the words so far have chosen this command'",
        "    set -l chosen ''",
        "    for word in (commandline -opc)[2..]",
        f"        if contains -- $chosen/$word {' '.join(command.path for command in commands[1:])}",
        "            set chosen $chosen/$word",
        "        end",
        "    end",
        '    test "$chosen" = "$argv[1]"',
        "end",
    ]
    for command in commands:
        condition = f"complete -c {PROGRAM} -n {_fish(f'__{PROGRAM}_at {_fish(command.path)}')}"
        for name, about in command.commands:
            lines.append(f"{condition} -f -a {_fish(name)} -d {_fish(about)}")
        if command.words:
            lines.append(f"{condition} -f -a {_fish(' '.join(command.words))}")
        for option in command.options:
            flags = [f"-{'l' if flag.startswith('--') else 's'} {flag.lstrip('-')}" for flag in option.flags]
            value = f"-x -a {_fish(' '.join(option.values))}" if option.values else "-r" * option.takes_value
            lines.append(" ".join(filter(None, [condition, *flags, value, f"-d {_fish(option.about)}"])))
    return "\n".join(lines) + "\n"


def _fish(text: str) -> str:
    """A word in single quotes, in which fish knows two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
