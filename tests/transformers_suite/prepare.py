"""Lay out transformers' tests of the installed release in a folder, with ours among its models.

The release's source archive (`pip download`) carries the mixins of models, configurations and training, but not the
folders beside them; those few files come from the release's tag on GitHub. Where it cannot be reached, stand-ins take
their place, and what then is not tested is said.

    python tests/transformers_suite/prepare.py FOLDER [--checkout DIR]
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import transformers

SUITE = Path(__file__).with_name("sliced_suite.py")
PLACE = "tests/models/slicegpt/test_modeling_slicegpt.py"
RAW = "https://raw.githubusercontent.com/huggingface/transformers/v{version}/{path}"
EMPTY_MIXIN = "class {name}:\n    pass\n"
# File of the repository -> what stands for it where it cannot be had.
BESIDE = {
    "tests/generation/test_utils.py": EMPTY_MIXIN.format(name="GenerationTesterMixin"),
    "tests/exporters/test_export.py": EMPTY_MIXIN.format(name="ExportTesterMixin"),
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/test_module/__init__.py": "",
    "utils/test_module/custom_configuration.py": "",
}


def unpack_archive(version: str, folder: Path) -> None:
    """The tests of the source archive that the package index holds."""
    with tempfile.TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        requirement = ["--no-binary", "transformers", f"transformers=={version}"]
        subprocess.run([*download, *requirement, "--dest", temporary], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(temporary, filter="data")
        shutil.copytree(Path(temporary) / f"transformers-{version}" / "tests", folder / "tests")


def fetch(version: str, path: str, checkout: Path | None) -> str | None:
    """A file of the release's tag, from a checkout or from GitHub; None where it cannot be had."""
    if checkout is not None:
        return (checkout / path).read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(RAW.format(version=version, path=path), timeout=30) as answer:
            return answer.read().decode()
    except OSError:
        return None


def prepare(folder: Path, checkout: Path | None) -> None:
    version = transformers.__version__
    shutil.rmtree(folder, ignore_errors=True)
    unpack_archive(version, folder)
    missing = []
    for path, stand_in in BESIDE.items():
        text = fetch(version, path, checkout)
        if text is None:
            missing.append(path)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(stand_in if text is None else text, encoding="utf-8")
    (folder / PLACE).parent.mkdir(parents=True)
    shutil.copy(SUITE, folder / PLACE)
    for package in {parent for path in [*BESIDE, PLACE] for parent in (folder / path).parents} - {folder}:
        if package.is_relative_to(folder / "tests"):
            (package / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    print(f"transformers {version}: its tests lie in {folder}")
    if missing:
        print(f"not reached, so not tested: {', '.join(missing)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is emptied first")
    parser.add_argument(
        "--checkout", type=Path, help="a checkout of transformers at the tag of the installed release"
    )
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.checkout)
