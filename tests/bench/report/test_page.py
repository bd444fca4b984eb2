"""The page of results: whole, self-contained, and honest about what is missing."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from slicegpt.bench.report.charts import INK, plot_results
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError

pytest.importorskip("matplotlib")

RECORDED = Path(__file__).parents[3] / "bench" / "results"

ENVIRONMENT = {
    "device": "Some <CPU>",
    "driver": None,
    "threads": 2,
    "load_average": 0.1,
    "versions": {"torch": "2.13.0", "cuda": None},
    "commit": "abc123",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "slicegpt bench token --slice 0,0.25",
}
NETWORKS = {"dense": {"slice": 0.0, "bytes": 8_000_000}, "sliced 25 %": {"slice": 0.25, "bytes": 6_000_000}}


def token_content() -> dict:
    rows = [
        {
            "network": network,
            **facts,
            "engine": engine,
            "batch": 1,
            "ms_median": 2.0,
            "ms_p10": 1.5,
            "ms_p90": 2.5,
            "tokens_per_second": 500.0,
            "bandwidth_fraction": None,
            "speedup": 1.5,
        }
        for network, facts in NETWORKS.items()
        for engine in ("plain", "fused")
    ]
    return {
        "benchmark": "token",
        "complete": False,
        "environment": ENVIRONMENT,
        "settings": {"model": ["folder/some-model"]},
        "baseline": "Best dense baseline: fused.",
        "skipped": [{"network": "dense", "engine": "hf-compile", "skipped": "no compiler"}],
        "rows": rows,
    }


def throughput_content() -> dict:
    points = [
        {"network": network, "engine": "fused", "batch": batch, "tokens_per_second": 100.0 * batch}
        for network in NETWORKS
        for batch in (1, 2, 4, 3)
    ]
    rows = [
        {
            "network": network,
            **facts,
            "engine": "fused",
            "batch": 4,
            "tokens_per_second": 400.0,
            "reason": "out of memory at batch 8",
        }
        for network, facts in NETWORKS.items()
    ]
    return {
        "benchmark": "throughput",
        "complete": True,
        "environment": ENVIRONMENT,
        "settings": {"shape": "llama-1b"},
        "rows": rows,
        "points": points,
    }


def layers_content() -> dict:
    operations = {"attention norm": 0.5, "q": 1.0, "out": 2.0, "MLP shortcut": 0.5}
    fused = {"norm + q + k + v": 1.0, "norm + gate + up + activation": 2.0, "down + shortcut": 0.25}
    rows = [
        {"variant": "dense, Hugging Face", "operations": {}, "layer_ms": 5.0, "agrees": None},
        {
            "variant": "dense, unfused",
            "operations": operations,
            "layer_ms": 4.0,
            "total_ms": 4.0,
            "agrees": True,
        },
        {"variant": "dense, fused", "operations": fused, "layer_ms": 2.0, "total_ms": 3.25, "agrees": False},
    ]
    return {"benchmark": "layers", "complete": True, "environment": ENVIRONMENT, "rows": rows}


def other_content() -> dict:
    return {"benchmark": "gram", "environment": ENVIRONMENT, "gram": [{"D": 576, "of published": 0.5}]}


class Checker(html.parser.HTMLParser):
    """Every tag that is opened is closed; collects identifiers and references."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe")
        self.identifiers += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "xlink:href", "src") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


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
    checker = Checker(page)
    assert len(checker.identifiers) == len(set(checker.identifiers))
    # Nothing is fetched: every link leads to a place on the page.
    assert {link[1:] for link in checker.links} <= set(checker.identifiers)
    assert all(link.startswith("#") for link in checker.links)
    assert not re.search(r"url\((?!#)|@import", page)
    assert page.count("<svg") == 3
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
    assert page.index("Time per token: ") < page.index("Covariance")


@pytest.mark.skipif(not RECORDED.is_dir(), reason="needs the source tree")
def test_every_recorded_result_has_a_section(tmp_path):
    """The figures that the documents quote stay readable, whichever version wrote them."""
    page = tmp_path / "page.html"
    for folder in RECORDED.iterdir():
        assert main(["bench", "report", str(folder), "--output", str(page)]) == 0
        text = page.read_text()
        checker = Checker(text)
        assert len(checker.identifiers) == len(set(checker.identifiers))
        sections = text.split("<section ")[1:]
        files = sorted(folder.rglob("*.json"))
        assert len(sections) == len(files) > 0
        for file in files:
            (section,) = [part for part in sections if f"<br>{file.name}</p>" in part]
            content = json.loads(file.read_text())
            assert content["environment"]["commit"] in section
            if content["benchmark"] in ("token", "throughput", "layers", "slicing") and "rows" in content:
                assert "<svg" in section, f"{file.name}: no plot"
                assert "<td" in section, f"{file.name}: no table"


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
