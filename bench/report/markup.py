"""HTML of the page's parts: style, tables, inline plots. Nothing is fetched: no script, font or image."""

import html
import io
import re
from collections.abc import Sequence

from slicegpt.bench.report.bars import INK
from slicegpt.bench.report.tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --dim: #5c5c5c; --paper: #ffffff; --rule: #d9d9d9; --band: #f5f6f7;
  --accent: #0b5c94; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --dim: #a3a3a3; --paper: #16181b; --rule: #3a3d41; --band: #1f2226; --accent: #7cc0ee; }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 0; line-height: 1.3; } h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.5rem; }
p { margin: .5rem 0; } .dim { color: var(--dim); font-size: .875rem; } a { color: var(--accent); }
code { font: .8rem ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.card { display: block; padding: .75rem 1rem .9rem; border: 1px solid var(--rule); border-radius: .6rem;
  background: var(--band); color: inherit; text-decoration: none; }
.card:hover { border-color: var(--accent); }
.card b { display: block; font-size: 1.9rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .of { display: block; color: var(--dim); font-size: .8125rem; line-height: 1.4; }
.card .title { font-size: .8125rem; font-weight: 600; }
nav { columns: 2 24rem; column-gap: 2.5rem; }
nav div { break-inside: avoid; padding-bottom: .6rem; } nav h3 { margin: 0 0 .1rem; } .part { display: inline-block; }
 nav ul { padding: 0; margin: 0; list-style: none; }
nav li { padding: .2rem 0; line-height: 1.35; font-size: .9375rem; } nav .dim { font-size: .8125rem; }
.headlines { margin: .75rem 0; padding: 0 0 0 1.1rem; } .headlines li { margin: .15rem 0; }
.headlines b { font-weight: 600; }
.plot { margin: 1rem 0; } .plot svg { display: block; max-width: 100%; height: auto; }
.plot .narrow { display: none; }
@media (max-width: 640px) { body { padding: 1.25rem 1rem 3rem; } table { font-size: .78rem; }
  th, td { padding: .25rem .4rem; } .cards { grid-template-columns: 1fr 1fr; } .card b { font-size: 1.45rem; }
  .plot .narrow { display: block; } .plot .wide { display: none; } }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
.caption { margin-bottom: 0; }
th, td { padding: .3rem .55rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap;
  vertical-align: top; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); } td.number, th.number { text-align: right; }
td.text { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); font-size: .9375rem; }
.badge { background: #b3261e; color: #fff; border-radius: .3rem; padding: .1rem .45rem; font-size: .8rem;
  vertical-align: middle; }
"""
# Text longer than this may be broken.
LONG = 40


def embedded(figure, prefix: str) -> str:
    """A matplotlib figure as inline SVG in the page's colours, at its own size at most."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several plots share the page: make identifiers, and the references to them, unique.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return re.sub(INK, "var(--ink)", text, flags=re.IGNORECASE)


def cell_text(value: object) -> str:
    """Numbers with thousands separators or four digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"


def table_html(table: Table) -> str:
    """A table; columns of numbers, or of text that begins with a number, are aligned right. Folded ones are closed."""
    titles, cells = table.titles, table.cells
    numeric = [
        all(row[i] is None or re.match(r"[-+−]?\d", str(row[i])) for row in cells) and any(titles)
        for i in range(len(titles))
    ]

    def cell(value: object, index: int, tag: str) -> str:
        long = isinstance(value, str) and len(value) > LONG
        kind = "text" if long else "number" if numeric[index] else ""
        return f'<{tag} class="{kind}">{html.escape(cell_text(value))}</{tag}>'

    head = "".join(cell(title, index, "th") for index, title in enumerate(titles)) if any(titles) else ""
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(
        "<tr>" + "".join(cell(value, index, "td") for index, value in enumerate(row)) + "</tr>"
        for row in cells
    )
    whole = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
    caption = html.escape(table.caption)
    # Not in the table: what is wider than a telephone is scrolled, and its caption would be with it.
    if not table.folded:
        return f'<p class="dim caption">{caption}</p>{whole}'
    return f"<details><summary>{caption}</summary>{whole}</details>"


def headline_html(told: str) -> str:
    """The ratio or figure that a headline is about stands out: the first that follows a word, or a colon."""
    number = r"(?<=[:a-z] )(?:\d[\d.,]*\d|\d)(?: (?:×|%|[kMGT]?B)(?!\w))?"
    return "<li>" + re.sub(number, r"<b>\g<0></b>", html.escape(told), count=1) + "</li>"


def paragraphs(notes: Sequence[str], kind: str = "dim") -> str:
    return "".join(f'<p class="{kind}">{html.escape(note)}</p>' for note in notes)
