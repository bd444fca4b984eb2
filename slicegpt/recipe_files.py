"""Choices in TOML and YAML files; which choices there are is known to `slicegpt.recipe`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slicegpt.errors import SliceGPTError, first_line


def checked_ending(path: str | Path) -> Path:
    """One clear error for a file that is none of those that are read and written."""
    file = Path(path)
    if file.suffix.lower() not in (".toml", ".yaml", ".yml"):
        raise SliceGPTError(f"must be a .toml or .yaml file, got {str(file)!r}", "recipe")
    return file


def read_choices(path: str | Path) -> dict[str, Any]:
    """What a `.toml`, `.yaml` or `.yml` file holds, by name; see `Recipe.read`."""
    file = checked_ending(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SliceGPTError(f"cannot read {file}: {reason}", "recipe") from error
    return _read_toml(text, file) if file.suffix.lower() == ".toml" else _read_yaml(text, file)


def as_toml(header: str, choices: Mapping[str, Any], groups: Mapping[str, str]) -> str:
    """TOML: a comment, then one line a choice, and before each of the `groups` that a choice is of its title."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(header))
    group = None
    for name, value in choices.items():
        if groups[name] != group:
            group = groups[name]
            document.add(tomlkit.nl())
            if group:
                document.add(tomlkit.comment(group))
        document.add(name, value)
    return tomlkit.dumps(document)


def as_yaml(header: str, choices: Mapping[str, Any]) -> str:
    """YAML: a comment, then one line a choice."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver(*_YAML_EXPONENT)
    return f"# {header}\n{yaml.dump(dict(choices), None, Dumper, sort_keys=False)}"


# 1.5e9 is a number, as YAML 1.2 and everybody has it; PyYAML wants 1.5e+9. Texts that look so are then quoted.
_YAML_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_toml(text: str, file: Path) -> dict[str, Any]:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        return tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        raise SliceGPTError(f"{file} is not TOML: {first_line(error)}", "recipe") from error


def _read_yaml(text: str, file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(*_YAML_EXPONENT)
    try:
        content = yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise SliceGPTError(f"{file} is not YAML: {first_line(error)}", "recipe") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise SliceGPTError(
            f"{file} must hold names with a value each, got {type(content).__name__}", "recipe"
        )
    return dict(content)
