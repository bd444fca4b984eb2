"""The page in headless Chromium, on a screen and on a telephone: nothing overlaps, nothing is cut off, links lead."""

import pytest
from support.browser import find_browser, measure

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="needs Chromium or Chrome (apt install chromium)"
)
WIDTHS = (1280, 390)


def test_page_of_every_kind(every_kind, tmp_path):
    results, page = every_kind
    reports = measure(page, WIDTHS, tmp_path)
    assert [report["width"] for report in reports] == list(WIDTHS)
    for report in reports:
        assert report["texts"] > 1000
        assert report["json"] == []
        assert report["overlaps"] == []
        assert report["beyond"] == []
        assert report["scrolls"] <= report["width"]
        assert report["lost"] == []
        # The cards, an entry for each result, and from each section back to the contents.
        assert report["links"] >= 2 * len(results)
        assert report["letters"] >= 8


def test_what_is_wrong_is_found(tmp_path):
    """A page with one mistake of every kind."""
    page = tmp_path / "page.html"
    page.write_text(
        """<!doctype html><body style="margin:0"><p style="margin:0">some text</p>
        <p style="margin:-12px 0 0">other text</p><table><tr><td>{"a": 1}</td></tr></table>
        <div style="width:2000px">wide</div><a href="#nowhere">lost</a>
        <svg width="40" height="20"><text y="10" font-size="4">tiny</text></svg></body>""",
        encoding="utf-8",
    )
    for report in measure(page, WIDTHS, tmp_path):
        assert report["overlaps"] == [["some text", "other text"]]
        assert report["json"] == ['{"a": 1}']
        assert any(found.startswith("DIV") for found in report["beyond"])
        assert report["scrolls"] >= 2000
        assert report["lost"]
        assert report["letters"] < 8
