"""The page of results: whole, self-contained, and honest about what is missing."""

import json
import re

import pytest
from support.parsed_page import ParsedPage
from support.result_files import ENVIRONMENT, layers_content, throughput_content, token_content

from slicegpt.bench.report.bars import INK
from slicegpt.bench.report.charts import plot_results
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError

pytest.importorskip("matplotlib")


def other_content() -> dict:
    return {"benchmark": "gram", "environment": ENVIRONMENT, "gram": [{"D": 576, "of published": 0.5}]}


@pytest.fixture
def folder(tmp_path):
    for name, content in {
        "token": token_content(),
        "throughput": throughput_content(),
        "layers": layers_content(),
        "gram": other_content(),
        "unrelated": {"a": 1},
    }.items():
        file = tmp_path / ("deep/er" if name == "gram" else ".") / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return tmp_path


def test_page_is_whole_and_self_contained(folder, capsys):
    assert main(["bench", "report", str(folder)]) == 0
    assert "4 results" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    checker = ParsedPage(page)
    assert len(checker.identifiers) == len(set(checker.identifiers))
    # Nothing is fetched: every link leads to a place on the page.
    assert {link[1:] for link in checker.links} <= set(checker.identifiers)
    assert all(link.startswith("#") for link in checker.links)
    assert not re.search(r"url\((?!#)|@import", page)
    assert page.count("<svg") == 2 * 3  # each plot for a screen and for a telephone
    assert page.lower().count(INK.lower()) == 1  # the style sheet's; in the plots it is replaced
    assert "prefers-color-scheme: dark" in page
    for text in (
        "Time per token: some-model",
        "Throughput: llama-1b",
        "One transformer layer",
        "incomplete",
        "Some &lt;CPU&gt;",
        "dense, hf-compile: not measured (no compiler)",
        "out of memory at batch 8",
        "Best dense baseline: fused.",
        "Apart by more than 10 %: dense, fused.",
        "slicegpt bench token --slice 0,0.25",
        "commit abc123",
        "of published",
    ):
        assert text in page, text
    assert page.index("<h2>Time per token: ") < page.index("<h2>Covariance")


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("make", [token_content, throughput_content, layers_content])
def test_plots_are_written(make, ending, tmp_path):
    file = tmp_path / f"plot.{ending}"
    plot_results(make(), file)
    start = file.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if ending == "png" else start.startswith(b"<?xml")


def test_unfinished_results_have_a_section_without_a_plot(tmp_path):
    content = {"benchmark": "token", "complete": False, "environment": ENVIRONMENT, "rows": []}
    (tmp_path / "token.json").write_text(json.dumps(content))
    assert main(["bench", "report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    assert "<svg" not in (tmp_path / "page.html").read_text()


def test_folder_without_results_and_broken_files_are_errors(tmp_path, capsys):
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "broken.json is not readable JSON" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_two_runs_are_held_against_each_other(tmp_path, capsys):
    """By hand: 1.5 against 1.2 is 25 % apart, 2.0 against 2.1 5 %. A baseline's own 1 does not count."""
    for run, (speedup, over) in {"a": (1.5, 2.0), "b": (1.2, 2.1)}.items():
        content = token_content() | {
            "ratios": [
                {"comparison": "fused over hf", "dtype": "float32", "ratio": over, "bytes_ratio": None}
            ]
        }
        content["rows"] = [
            row | {"speedup": 1 if row["slice"] == 0 else speedup}
            for row in content["rows"]
            if row["engine"] == "fused" or run == "a"
        ]
        (tmp_path / run).mkdir()
        (tmp_path / run / "token.json").write_text(json.dumps(content))
        (tmp_path / run / f"only-{run}.json").write_text(json.dumps(content))
    assert main(["bench", "report", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert (
        "2 ratios: 15.0% apart in the median, at most 25.0% (sliced 25 %, fused); 1 within 10 %." in printed
    )
    assert not (tmp_path / "a" / "report.html").exists()
    (tmp_path / "b" / "token.json").unlink()
    assert main(["bench", "report", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 2
    assert "have no ratio in common" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "a"), "--against", "nowhere"]) == 2
    assert "--against: expected a folder of results, got nowhere" in capsys.readouterr().err


def test_plot_file_must_be_png_or_svg():
    with pytest.raises(
        SliceGPTError, match=r"--plot: expected a file that ends in \.png or \.svg, got x\.pdf"
    ):
        plot_results(token_content(), "x.pdf")
