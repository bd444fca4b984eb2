"""How the Triton kernels are launched: with fused multiply-adds, whatever a release takes by default."""

import ast
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def launches(path: Path) -> list[ast.Call]:
    """Calls of `kernel[grid](...)`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]


def kernels(path: Path) -> set[str]:
    """Functions that are compiled by themselves or into others: decorated with triton.jit."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(one) == "triton.jit" for one in node.decorator_list)
    }


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_launch_asks_for_fused_multiply_add(path):
    """Triton 3.10 no longer fuses by default: other bits, and another speed."""
    found = launches(path)
    assert {call.func.value.id for call in found} <= kernels(path)
    for call in found:
        options = {one.arg: ast.unparse(one.value) for one in call.keywords}
        assert options.get("enable_fp_fusion") == "True", f"{path.name}, line {call.lineno}"


def test_every_file_of_kernels_launches_them():
    """None is launched in a way that the test above does not see."""
    shared = {"attention_config", "gemm_config", "gemm_tiles"}
    assert {path.stem for path in KERNELS if launches(path)} == {path.stem for path in KERNELS} - shared


def test_this_triton_takes_the_option():
    """A compiler option; the interpreter drops those that it does not know."""
    pytest.importorskip("triton")
    from triton.backends.nvidia.compiler import CUDAOptions

    assert "enable_fp_fusion" in inspect.signature(CUDAOptions).parameters
