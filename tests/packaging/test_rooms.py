"""Data flows one way: the imports between the rooms of the house have no cycle."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Triton's kernels stand in a folder of their own at the root, and are part of the operators.
ALIASES = {"kernels": "ops"}
# At the top, every room may use them, and they use none.
SHARED = {
    "errors",
    "lazy",
    "progress",
    "recipe",
    "recipe_files",
    "recipe_rules",
    "step_times",
    "table",
    "units",
}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package, by its one name."""
    found = {}
    for top in ("slicegpt", "kernels", "bench"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "slicegpt" and parts[1] in ("kernels", "bench"):
                continue  # links to the root folders
            found[".".join(parts if top == "slicegpt" else ("slicegpt", *parts))] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, at its top or inside functions."""
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole in known else source)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module.split(".")[0] == "slicegpt"} - {name}


def room(module: str) -> str:
    parts = module.split(".")
    return ALIASES.get(parts[1], parts[1]) if len(parts) > 1 else "slicegpt"


def graphs() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    known = modules()
    files = {name: imported(name, path, known) for name, path in known.items()}
    rooms = defaultdict(set)
    for name, targets in files.items():
        if room(name) not in ("__init__", "__main__"):
            rooms[room(name)] |= {room(target) for target in targets} - {room(name), "slicegpt"}
    return files, rooms


def test_no_cycle_between_files():
    files, _ = graphs()
    assert len(files) > 100
    assert tuple(TopologicalSorter(files).static_order())


def test_no_cycle_between_rooms():
    _, rooms = graphs()
    assert {"slicing", "conversion", "checkpoint", "ops", "bench"} <= rooms.keys()
    assert tuple(TopologicalSorter(rooms).static_order())
    for shared in SHARED:
        assert rooms[shared] <= SHARED


def test_only_the_command_line_imports_the_benches():
    _, rooms = graphs()
    assert {name for name, targets in rooms.items() if "bench" in targets} == {"cli"}
