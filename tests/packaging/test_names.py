"""A class name says what a class is: none stands for two things in the package."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_class_name_is_defined_twice():
    places = defaultdict(list)
    for top in ("slicegpt", "kernels", "bench"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] in (("slicegpt", "kernels"), ("slicegpt", "bench")):
                continue  # links to the root folders
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert not {name: files for name, files in places.items() if len(files) > 1}
