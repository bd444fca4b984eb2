"""`slicegpt bench report`: the results in a folder as one self-contained HTML page.

It begins with cards (the best speed-up, tokens/s, bytes, perplexity) and contents; every result has headlines, a plot,
its tables, of which long ones are folded, and how it was measured.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from slicegpt.bench.harness.display import notes, skipped_line, stop_lines
from slicegpt.bench.harness.titles import TITLES, subject_of, threads_of, title_of
from slicegpt.bench.report.cards import cards_of
from slicegpt.bench.report.charts import TELEPHONE, WIDE, draw
from slicegpt.bench.report.headlines import headlines_of
from slicegpt.bench.report.markup import STYLE, embedded, headline_html, paragraphs, table_html
from slicegpt.bench.report.tables import UNREADABLE, tables_of

# Kinds whose rows have what the notes of a run are about.
RUNS = ("token", "throughput", "layers", "slicing")


def dtypes_of(content: Mapping) -> str:
    """The dtypes that were measured, where the result says so."""
    settings = content.get("settings") or {}
    found = dict.fromkeys(
        row["dtype"] for row in content.get("rows") or () if isinstance(row, Mapping) and row.get("dtype")
    )
    given = settings.get("dtype") or content.get("dtype") or []
    found = found or dict.fromkeys([given] if isinstance(given, str) else given)
    return ", ".join(name for name in found if name != "auto")


def place_of(content: Mapping) -> str:
    """Device and threads; empty where the file does not say."""
    where = content["environment"]
    if not where["device"]:
        return ""
    return where["device"] + (f", {threads_of(where)}" if where["threads"] else "")


def short_names(files: Sequence[Path]) -> list[str]:
    """Names of files, with as many of their folders as tell them apart."""
    names = []
    for file in files:
        depth = 1
        while sum(other.parts[-depth:] == file.parts[-depth:] for other in files) > 1 and depth < len(
            file.parts
        ):
            depth += 1
        names.append("/".join(file.parts[-depth:]))
    return names


def facts_of(content: Mapping, name: str) -> str:
    """HTML of what tells a result from others of its kind: dtype, device, date, file; lines break between them."""
    date = (content["environment"]["date"] or "")[:10]
    parts = [part for part in (dtypes_of(content), place_of(content), date, name) if part]
    dotted = [part + " ·" for part in parts[:-1]] + parts[-1:]
    return " ".join(f'<span class="part">{html.escape(part)}</span>' for part in dotted)


def how_measured(content: Mapping, name: str) -> str:
    """Versions, commit, driver and command, folded."""
    where = content["environment"]
    told = [name]
    if where["device"]:
        driver = f", driver {where['driver']}" if where.get("driver") else ""
        told.append(f"{place_of(content)}{driver}")
    told += [part for part in (where["date"], where["commit"] and f"commit {where['commit']}") if part]
    versions = ", ".join(f"{part} {value}" for part, value in where["versions"].items() if value)
    lines = [" · ".join(told), versions]
    shown = "<br>".join(html.escape(line) for line in lines if line)
    command = f"<br><code>{html.escape(where['command'])}</code>" if where["command"] else ""
    return f'<details><summary>how it was measured</summary><p class="dim">{shown}{command}</p></details>'


def plots(content: Mapping, anchor: str) -> str:
    """The plot in two widths, of which the style shows the one that fits."""
    shown = []
    for name, width in (("wide", WIDE), ("narrow", TELEPHONE)):
        try:
            figure = draw(content, width)
        except UNREADABLE:
            return ""  # an older form: its tables show what there is
        if figure is not None:
            shown.append(f'<div class="{name}">{embedded(figure, f"{anchor}{name[0]}")}</div>')
    return f'<div class="plot">{"".join(shown)}</div>' if shown else ""


def section(content: Mapping, name: str, anchor: str) -> str:
    """One result."""
    badge = "" if content.get("complete", True) else ' <span class="badge">incomplete</span>'
    told = notes(content) if content["benchmark"] in RUNS and "rows" in content else content.get("notes", [])
    told = [*told, *stop_lines(content.get("rows") or ()), *map(skipped_line, content.get("skipped") or ())]
    headlines = "".join(headline_html(line) for line in headlines_of(content))
    parts = [
        f'<section id="{anchor}"><h2>{html.escape(title_of(content))}{badge}</h2>',
        f'<p class="dim">{facts_of(content, name)}</p>',
        f'<ul class="headlines">{headlines}</ul>' if headlines else "",
        plots(content, anchor),
        *(table_html(table) for table in tables_of(content)),
        paragraphs(told),
        how_measured(content, name),
        '<p class="dim"><a href="#top">to the contents</a></p></section>',
    ]
    return "".join(parts)


def cards(results: Sequence[Mapping], anchors: Sequence[str]) -> str:
    shown = "".join(
        f'<a class="card" href="#{anchors[card.index]}"><span class="title">{html.escape(card.title)}</span>'
        f'<b>{html.escape(card.figure)}</b><span class="of">{html.escape(card.detail)}</span></a>'
        for card in cards_of(results)
    )
    return f'<div class="cards">{shown}</div>' if shown else ""


def contents(results: Sequence[Mapping], names: Sequence[str], anchors: Sequence[str]) -> str:
    """Entries by kind; each names what it is of, and what tells it from the others."""
    parts = []
    for kind in dict.fromkeys(content["benchmark"] for content in results):
        entries = []
        for content, name, anchor in zip(results, names, anchors, strict=True):
            if content["benchmark"] == kind:
                title = subject_of(content) or name
                entries.append(
                    f'<li><a href="#{anchor}">{html.escape(title)}</a> '
                    f'<span class="dim">{facts_of(content, "" if title == name else name)}</span></li>'
                )
        parts.append(f"<div><h3>{html.escape(TITLES.get(kind, kind))}</h3><ul>{''.join(entries)}</ul></div>")
    return f"<nav>{''.join(parts)}</nav>"


def render(results: Sequence[tuple[Path, Mapping]]) -> str:
    """The whole page, of results as `results.read_results` returns them."""
    order = {kind: index for index, kind in enumerate(TITLES)}

    def place(pair: tuple[Path, Mapping]) -> tuple[int, str]:
        return order.get(pair[1]["benchmark"], len(order)), str(pair[0].with_suffix(""))

    results = sorted(results, key=place)
    names = short_names([file for file, _ in results])
    figures = [content for _, content in results]
    anchors = [f"r{index}" for index in range(len(results))]
    devices = ", ".join(
        dict.fromkeys(c["environment"]["device"] for c in figures if c["environment"]["device"])
    )
    dates = sorted(c["environment"]["date"][:10] for c in figures if c["environment"]["date"])
    span = (dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}") if dates else ""
    count = f"{len(results)} result{'s' if len(results) > 1 else ''}"
    head = " · ".join(part for part in (devices, span, count) if part)
    sections = "".join(
        section(content, name, anchor) for content, name, anchor in zip(figures, names, anchors, strict=True)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>slicegpt: results</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body id="top"><h1>slicegpt: results</h1>
<p class="dim">{html.escape(head)}</p>
{cards(figures, anchors)}{contents(figures, names, anchors)}{sections}</body></html>
"""
