"""The installed layout: one name for every folder, and nothing of ours shadows anything."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="needs the source tree")


def run(code: str, *path: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_transformers_imports_from_the_repository_root():
    """The folder `kernels` must not be taken for Hugging Face's package of that name."""
    done = run("from transformers import LlamaForCausalLM; import slicegpt, slicegpt.kernels, slicegpt.bench")
    assert done.returncode == 0, done.stderr


def test_transformers_imports_beside_hugging_face_kernels(tmp_path):
    """With a package `kernels` installed, the root folder does not hide it: `import kernels` is still theirs."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("installed = True\n")
    done = run("import kernels; assert kernels.installed, kernels.__path__", tmp_path)
    assert done.returncode == 0, done.stderr


def installed(name: str) -> bool:
    """By its metadata: looked up by name alone, the root folder itself would pass for a package `kernels`."""
    return any(importlib.metadata.distributions(name=name))


@pytest.mark.skipif(not installed("kernels"), reason="needs Hugging Face's kernels")
def test_transformers_imports_with_the_real_hugging_face_kernels():
    done = run(
        "import kernels; assert kernels.get_kernel\n"
        "from transformers import LlamaForCausalLM; import slicegpt, slicegpt.kernels"
    )
    assert done.returncode == 0, done.stderr


def test_no_package_marker_in_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_links_name_the_root_folders():
    for name in ("kernels", "bench"):
        assert (ROOT / "slicegpt" / name).resolve() == (ROOT / name).resolve()


def test_no_module_bears_a_standard_library_name():
    names = {path.stem for folder in ("bench", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert not names & sys.stdlib_module_names
