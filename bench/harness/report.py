"""`slicegpt bench report`: the results in a folder as one HTML page, with embedded plots and no external resources."""

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from slicegpt.bench.harness.charts import INK, draw
from slicegpt.bench.harness.columns import COLUMNS, table
from slicegpt.bench.harness.display import notes, operation_table, skipped_line
from slicegpt.bench.harness.titles import TITLES, threads_of, title_of
from slicegpt.errors import SliceGPTError

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --dim: #5c5c5c; --paper: #ffffff; --rule: #d9d9d9; --band: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --dim: #a3a3a3; --paper: #16181b; --rule: #3a3d41; --band: #1f2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; }
p { margin: .5rem 0; } .dim { color: var(--dim); font-size: .9rem; }
nav ul { padding-left: 1.2rem; margin: .5rem 0; } a { color: inherit; }
code { font: .85rem ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); } td.number, th.number { text-align: right; }
td.text { white-space: normal; min-width: 12rem; }
svg { max-width: 100%; height: auto; } .key { font-weight: 600; }
.badge { background: #b3261e; color: #fff; border-radius: .3rem; padding: .1rem .45rem; font-size: .8rem;
  vertical-align: middle; }
"""


def read_results(folder: str | Path, option: str = "DIR") -> list[tuple[Path, dict]]:
    """Every result file below a folder; other JSON files are skipped.

    Raises:
        SliceGPTError: the folder is not there, a file is not JSON, or there is no result at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SliceGPTError(f"{option}: expected a folder of results, got {folder}")
    found = []
    for file in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SliceGPTError(f"{option}: {file} is not readable JSON: {error}") from error
        if isinstance(content, dict) and {"benchmark", "environment"} <= set(content):
            found.append((file, content))
    if not found:
        raise SliceGPTError(f"{option}: {folder} holds no results (JSON files that slicegpt bench wrote)")
    return found


def embedded_plot(content: Mapping, prefix: str) -> str:
    """The plot of a result as inline SVG in the page's colours; empty where there is none."""
    figure = draw(content)
    if figure is None:
        return ""
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


def html_table(titles: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """A table; columns of numbers, or of text that begins with a number, are aligned right."""
    numeric = [
        all(row[i] is None or re.match(r"[-+−]?\d", str(row[i])) for row in cells) for i in range(len(titles))
    ]

    def cell(value: object, index: int, tag: str) -> str:
        long = isinstance(value, str) and len(value) > 48
        kind = "number" if numeric[index] else "text" if long else ""
        shown = "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value}"
        if isinstance(value, float) and abs(value) >= 1e4:
            shown = f"{value:,.0f}"
        if isinstance(value, int) and not isinstance(value, bool):
            shown = f"{value:,}"
        return f'<{tag} class="{kind}">{html.escape(shown)}</{tag}>'

    head = "".join(cell(title, index, "th") for index, title in enumerate(titles))
    body = "".join(
        "<tr>" + "".join(cell(value, index, "td") for index, value in enumerate(row)) + "</tr>"
        for row in cells
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plain_tables(content: Mapping) -> list[str]:
    """For a benchmark without an entry in `COLUMNS`: every list of rows in its result."""
    tables = []
    for name, value in content.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            titles = list(dict.fromkeys(title for row in value for title in row))
            flat = [[_flat(row.get(title)) for title in titles] for row in value]
            tables.append(f"<p>{html.escape(name)}</p>" + html_table(titles, flat))
    return tables


def _flat(value: object) -> object:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def section(file: Path, content: Mapping, anchor: str) -> str:
    """One result: title, notes, plot, tables, environment."""
    where = content["environment"]
    known = content["benchmark"] in COLUMNS and "rows" in content
    told = notes(content) if known else content.get("notes", [])
    parts = [f'<section id="{anchor}"><h2>{html.escape(title_of(content))}']
    if not content.get("complete", True):
        parts.append(' <span class="badge">incomplete</span>')
    parts.append("</h2>")
    classes = ["key", *["dim"] * len(told)] if content.get("baseline") else ["dim"] * len(told)
    parts += [f'<p class="{kind}">{html.escape(note)}</p>' for kind, note in zip(classes, told, strict=False)]
    if known:
        parts.append(embedded_plot(content, anchor))
        if content["rows"]:
            parts.append(html_table(*table(content["benchmark"], content["rows"])))
        if content["benchmark"] == "layers" and content["rows"]:
            parts.append(html_table(*operation_table(content["rows"])))
        if content.get("ratios"):
            parts.append(html_table(*table("ratios", content["ratios"])))
        for row in content.get("skipped", ()):
            parts.append(f'<p class="dim">{html.escape(skipped_line(row))}</p>')
    else:
        parts += plain_tables(content)
    versions = ", ".join(f"{name} {value}" for name, value in where["versions"].items() if value)
    driver = f", driver {where['driver']}" if where.get("driver") else ""
    threads = f", {threads_of(where)}" if where["threads"] else ""  # a prediction on paper has none
    facts = f"{where['device']}{threads}{driver} · {where['date']} · commit {where['commit']}"
    parts.append(f'<p class="dim">{html.escape(facts)}<br>{html.escape(versions)}<br>')
    parts.append(f"<code>{html.escape(where['command'])}</code><br>{html.escape(file.name)}</p></section>")
    return "".join(parts)


def render(results: Sequence[tuple[Path, Mapping]]) -> str:
    """The whole page."""
    order = list(TITLES)
    results = sorted(
        results,
        key=lambda pair: (
            order.index(pair[1]["benchmark"]) if pair[1]["benchmark"] in order else len(order),
            str(pair[0]),
        ),
    )
    anchors = [f"r{index}" for index in range(len(results))]
    links = "".join(
        f'<li><a href="#{anchor}">{html.escape(title_of(content))}</a></li>'
        for anchor, (_, content) in zip(anchors, results, strict=True)
    )
    devices = ", ".join(dict.fromkeys(content["environment"]["device"] for _, content in results))
    dates = sorted(content["environment"]["date"][:10] for _, content in results)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    sections = "".join(
        section(file, content, anchor) for anchor, (file, content) in zip(anchors, results, strict=True)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>slicegpt bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>slicegpt bench</h1>
<p class="dim">{html.escape(devices)} · {span} · {len(results)} results</p>
<nav><ul>{links}</ul></nav>{sections}</body></html>
"""
