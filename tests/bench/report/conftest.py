"""A page of one result of every kind: those that are recorded, and those that are not."""

import json
import shutil
from pathlib import Path

import pytest
from support.result_files import write_unrecorded

from slicegpt.bench.report.results import read_results, recognised

RECORDED = Path(__file__).parents[3] / "bench" / "results"


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory) -> tuple[list[tuple[Path, dict]], Path]:
    """Results as `read_results` gives them, and the page of them. Do not change them."""
    pytest.importorskip("matplotlib")
    from slicegpt.bench.report.page import render

    if not RECORDED.is_dir():
        pytest.skip("needs the source tree")
    folder = tmp_path_factory.mktemp("results")
    write_unrecorded(folder)
    kinds = set()
    for file in sorted(RECORDED.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        form = (recognised(content)["benchmark"], "comparisons" in content, "stages" in content)
        if form not in kinds:
            shutil.copy(file, folder)
            kinds.add(form)
    results = read_results(folder)
    page = folder / "report.html"
    page.write_text(render(results), encoding="utf-8")
    return results, page
