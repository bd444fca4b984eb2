"""Messages for people name options and files, not the functions of the library that noticed something."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import slicegpt

ROOT = Path(slicegpt.__file__).parent
# Operators and kernels name themselves: who reads their messages calls them, or asked for them by SLICEGPT_BACKEND.
OPERATORS = {"ops", "kernels"}


def sources() -> list[Path]:
    files = [*ROOT.rglob("*.py"), *(ROOT / "bench").resolve().rglob("*.py")]
    return [file for file in files if not OPERATORS & set(file.parts)]


def functions() -> set[str]:
    """Names of all functions of the package and of the benchmarks that are no words of English ("note: ...")."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in sources())
    names = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if "_" in name}


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and beginning of every string that is an argument of a call."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            for argument in call.args:
                if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
                    argument = argument.values[0]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield call.lineno, argument.value


def test_no_message_begins_with_the_name_of_a_function():
    known = functions()
    assert {"load_documents", "load_dense", "check_fits"} <= known
    found = []
    for file in sources():
        for line, text in messages(ast.parse(file.read_text(encoding="utf-8"))):
            prefix, colon, _ = text.partition(": ")
            if colon and prefix in known:
                found.append(f"{file.relative_to(ROOT.parent)}:{line}: {text}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", ["f('load_dense: x')", "f(f'load_dense: {x}')"])
def test_what_is_looked_for(source):
    ((_, text),) = messages(ast.parse(source))
    assert text.startswith("load_dense: ")
