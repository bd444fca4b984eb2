"""Write the tree of the source folders into docs/design.md: `python docs/tree.py` after adding or moving a file.

tests/packaging/test_docs.py compares the page with the folders. A folder is described by DESCRIPTIONS, or by the first
sentence of its `__init__.py`.
"""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- tree: written by docs/tree.py -->", "<!-- end of tree -->"
TOP = ("slicegpt", "kernels", "csrc", "bench")
WIDTH = 110

DESCRIPTIONS = {
    "slicegpt": "the package; the command line, the Python API and what every room may use",
    "slicegpt/families": "where a Hugging Face checkpoint keeps its weights, and the facts of its config",
    "slicegpt/conversion": "folding norms, the canonical form, the plan: widths, neurons, true size",
    "slicegpt/calibration": "documents → samples → batches; mixtures; text that the model writes",
    "slicegpt/slicing": "streams → covariance → basis → refit → sliced blocks, boundary by boundary",
    "slicegpt/modeling": "SlicedConfig, SlicedForCausalLM and the other heads, plain PyTorch; sizes",
    "slicegpt/checkpoint": "loading (folder, hub, GGUF), saving, the record of a run, the model card",
    "slicegpt/evaluation": "perplexity, zero-shot tasks, the frontier and its baselines, plots",
    "slicegpt/ops": "the operators: contracts, reference, dispatch",
    "slicegpt/ops/cuda": "launchers of csrc/'s CUDA kernels",
    "slicegpt/ops/cpu": "launchers of csrc/cpu's kernels",
    "slicegpt/runtime": "packed weights, cache, decoding, the engine",
    "slicegpt/finetune": "LoRA on a sliced model (PEFT), merged",
    "slicegpt/serving": "vLLM",
    "slicegpt/hardware": "devices and their rates, memory, offloading",
    "slicegpt/cli": "one file a command",
    "kernels": "Triton kernels, imported as slicegpt.kernels",
    "csrc": "CUDA kernels, free of torch, and their pybind11 bindings",
    "csrc/cpu": "the CPU's kernels, one translation unit an instruction set",
    "bench": "imported as slicegpt.bench",
    "bench/harness": "timing, memory, records, columns, the terminal's tables",
    "bench/report": "the page of results: reading, tables, headlines, cards, plots",
    "bench/models": "shapes, devices, engines: what is measured",
    "bench/commands": "slicegpt bench ..., and whole experiments",
    "bench/kernels": "single operators",
    "bench/results": "committed results, one folder a device",
}


def tree() -> str:
    """The folders of TOP with their files, as text."""
    return "\n".join(line for name in TOP for line in _folder(ROOT / name, 0))


def _folder(folder: Path, depth: int) -> list[str]:
    indent = "    " * depth
    lines = [f"{indent + folder.name + '/':<20} {_description(folder)}".rstrip()]
    # Links (slicegpt/kernels, slicegpt/bench) name folders that are drawn at the root.
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and _is_source(path))
    if files:
        inside = "    " * (depth + 1)
        lines += textwrap.wrap(
            "  ".join(files), WIDTH, initial_indent=inside, subsequent_indent=inside, break_on_hyphens=False
        )
    for child in folders:
        if not child.name.startswith(("_", ".")):
            lines += _folder(child, depth + 1)
    return lines


def _is_source(path: Path) -> bool:
    if path.name.startswith(".") or "results" in path.parts:
        return False
    return path.name != "__init__.py" and path.suffix not in (".so", ".pyc", ".pyd", ".json")


def _description(folder: Path) -> str:
    name = folder.relative_to(ROOT).as_posix()
    marker = folder / "__init__.py"
    if name in DESCRIPTIONS or not marker.exists():
        return DESCRIPTIONS.get(name, "")
    docstring = ast.get_docstring(ast.parse(marker.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0].rstrip(".")


def page_with(text: str, page: str) -> str:
    """The page with `text` between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n```text\n{text}\n```\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(tree(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
