"""Every kind of result that a command writes has its own tables, headlines and plot; without a browser."""

import ast
import re
from pathlib import Path

import pytest
from support.parsed_page import ParsedPage
from support.result_files import (
    UNRECORDED,
    frontier_content,
    of_kind,
    throughput_content,
    token_content,
)

from slicegpt.bench.harness.titles import TITLES
from slicegpt.bench.report.bars import ENGINE_COLOURS, Bar, BarChart, Group
from slicegpt.bench.report.cards import cards_of
from slicegpt.bench.report.headlines import HEADLINES, headlines_of
from slicegpt.bench.report.markup import headline_html
from slicegpt.bench.report.page import short_names
from slicegpt.bench.report.results import read_results, recognised
from slicegpt.bench.report.tables import SHOWN_ROWS, TABLES, tables_of

ROOT = Path(__file__).parents[3]
# There is nothing to compare in them.
WITHOUT_PLOT = {"tuned", "generation", "conversation", "environment"} | {
    "plan",
    "memory",
    "ranks",
    "resume_kills",
    "ceilings",
    "overlap",
    "speedup",
    "planes",
    "expert refit",
    "rehearsal",
    "plans",
}
WITHOUT_HEADLINE = {"tuned", "kernels", "conversation", "environment"}
JSON = re.compile(r"""[{}]|\[\s*["\d[]""")


def kinds_written() -> set[str]:
    """The names that the sources give to `write_results`, `Record` and `paper_record`."""
    found = set()
    for file in [*ROOT.glob("bench/**/*.py"), *ROOT.glob("slicegpt/cli/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = {"write_results": 1, "Record": 0, "paper_record": 0}.get(node.func.id)
                if place is not None and isinstance(node.args[place], ast.Constant):
                    found.add(node.args[place].value)
    return found


@pytest.mark.skipif(not (ROOT / "bench" / "results").is_dir(), reason="needs the source tree")
def test_every_kind_is_known(every_kind):
    results, _ = every_kind
    from slicegpt.bench.report.charts import BARS, DRAWINGS

    shown = {content["benchmark"] for _, content in results}
    written = kinds_written()
    assert {"gram", "rotation", "vllm", "predict", "published"} <= written
    assert written | set(UNRECORDED) <= shown
    assert shown == set(TITLES) == set(TABLES)
    assert set(BARS) | set(DRAWINGS) == shown - WITHOUT_PLOT
    assert set(HEADLINES) == shown - WITHOUT_HEADLINE


def test_every_section_has_a_table_a_headline_and_a_plot(every_kind):
    results, page = every_kind
    text = page.read_text(encoding="utf-8")
    sections = text.split("<section ")[1:]
    assert len(sections) == len(results) >= len(TITLES)
    for file, content in results:
        (section,) = [part for part in sections if f">{file.name}<" in part]
        kind = content["benchmark"]
        assert "<td" in section, f"{file.name}: no table"
        assert section.count("<svg") == (0 if kind in WITHOUT_PLOT else 2), f"{file.name}: plots"
        assert ("headlines" in section) == (kind not in WITHOUT_HEADLINE), f"{file.name}: headlines"
        if content["environment"]["commit"]:
            assert content["environment"]["commit"] in section


@pytest.mark.skipif(not (ROOT / "bench" / "results").is_dir(), reason="needs the source tree")
def test_every_recorded_result_is_read():
    """The figures that the documents quote stay readable, whichever version wrote them."""
    from slicegpt.bench.report.charts import BARS

    results = read_results(ROOT / "bench" / "results")
    assert len(results) == len(list((ROOT / "bench" / "results").rglob("*.json")))
    for file, content in results:
        assert tables_of(content), file
        assert TABLES[content["benchmark"]](content), f"{file}: in a form that is not known"
        assert headlines_of(content), file
        if content["benchmark"] in BARS:
            assert all(group.bars for group in BARS[content["benchmark"]](content).groups), file


def test_page_of_every_kind_is_whole(every_kind):
    _, page = every_kind
    parsed = ParsedPage(page.read_text(encoding="utf-8"))
    assert len(parsed.identifiers) == len(set(parsed.identifiers))
    assert all(link.startswith("#") for link in parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.identifiers)
    assert len(parsed.cells) > 1000
    assert not [cell for cell in parsed.cells if JSON.search(cell)]
    assert len(parsed.entries) == len(set(parsed.entries)) >= len(TITLES)
    # Facts of one thing have a line each; every other table is folded where it is long.
    assert max(parsed.open_rows) <= max(SHOWN_ROWS, 12)


def test_no_cell_of_any_table_is_a_list_or_a_mapping(every_kind):
    results, _ = every_kind
    for file, content in results:
        for table in tables_of(content):
            assert table.caption
            for row in table.cells:
                assert len(row) == len(table.titles)
                for cell in row:
                    assert cell is None or isinstance(cell, str | int | float), file
                    assert not JSON.search(str(cell)), file


def test_headlines_by_hand():
    """750 over 500 tokens/s is 1.50; 8 MB over 6 MB 1.33. The best engine of each network counts."""
    assert headlines_of(token_content()) == [
        "25 % sliced, float32: 1.50 × dense (bytes allow 1.33 ×), 750 tokens/s"
    ]
    assert headlines_of(throughput_content()) == ["25 % sliced: 1.00 × dense, 400 tokens/s at batch 4"]
    assert headlines_of(recognised(frontier_content())) == [
        "ours, 90 % of the parameters: perplexity 13 on text (dense 12.2)"
    ]
    assert headline_html("25 % sliced: 1.21 × dense") == "<li>25 % sliced: <b>1.21 ×</b> dense</li>"
    assert headline_html("slicing takes 3.18 passes") == "<li>slicing takes <b>3.18</b> passes</li>"


def test_cards_by_hand():
    results = [throughput_content(), token_content(), recognised(frontier_content())]
    found = {card.title: (card.figure, card.index) for card in cards_of(results)}
    assert found == {
        "best speed-up": ("1.50 ×", 1),
        "tokens/s": ("400", 0),
        "bytes": ("3.6 kB", 2),
        "perplexity": ("13", 2),
    }
    assert cards_of([of_kind("gram", gram=[])]) == []


def test_token_plot_has_a_group_for_each_network_and_fixed_colours():
    from slicegpt.bench.report.speed_charts import token_bars

    chart = token_bars(token_content())
    assert [group.title for group in chart.groups] == ["dense", "sliced 25 %"]
    assert [bar.colour for bar in chart.groups[1].bars] == [ENGINE_COLOURS["plain"], ENGINE_COLOURS["fused"]]
    # The dense runtime's 500 tokens/s times 8 MB / 6 MB.
    assert chart.groups[0].mark is None
    assert chart.groups[1].mark == pytest.approx(500 * 8 / 6)
    assert len(set(ENGINE_COLOURS.values())) == len(ENGINE_COLOURS)


def test_drawn_bars_are_as_long_as_their_values_and_say_them():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from slicegpt.bench.report.bars import draw_bars

    axis = Figure(figsize=(7, 4)).add_subplot()
    groups = [Group("one", [Bar("a", 2.0), Bar("b", 123.4)]), Group("two", [Bar("a", 50.0)], mark=80.0)]
    draw_bars(BarChart("tokens/s", groups, "allowed"), axis)
    assert [patch.get_width() for patch in axis.patches] == [2.0, 123.4, 50.0]
    assert {"2", "123", "50", "one", "two"} <= {text.get_text() for text in axis.texts}
    (mark,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert list(mark.get_xdata()) == [80.0, 80.0]
    assert axis.get_legend_handles_labels()[1] == ["allowed"]


def test_files_of_the_same_name_are_told_apart():
    files = [Path("a/x/token.json"), Path("b/x/token.json"), Path("gram.json")]
    assert short_names(files) == ["a/x/token.json", "b/x/token.json", "gram.json"]


@pytest.mark.parametrize("kind", [*TITLES, "something new"])
def test_results_of_another_form_still_have_a_section(kind):
    """A file of another version lacks what this one looks for: its rows are shown, and nothing else is lost."""
    from slicegpt.bench.report.page import section

    content = recognised(
        {"benchmark": kind, "environment": {"device": "Some CPU"}, "rows": [{"odd": [1, 2]}]}
    )
    shown = section(content, "file.json", "r0")
    assert "file.json" in shown
    assert not JSON.search("".join(ParsedPage(shown).cells))
