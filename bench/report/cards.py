"""The cards at the head of the page: the best speed-up, tokens/s, bytes and perplexity of all results in a folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slicegpt.bench.harness.titles import subject_of
from slicegpt.bench.report.headlines import figure, plain_label, sliced_and_dense, times
from slicegpt.modeling.sizes import format_bytes


@dataclass(frozen=True)
class Card:
    """One figure, what it is, and of what; `index` is the result that it was taken from."""

    title: str
    figure: str
    detail: str
    index: int


def _runs(results: Sequence[Mapping], kinds: Sequence[str]) -> Iterator[tuple[int, Mapping]]:
    return (pair for pair in enumerate(results) if pair[1]["benchmark"] in kinds)


def _speeds(results: Sequence[Mapping], kinds: Sequence[str]) -> list[tuple[float, Mapping, Mapping, int]]:
    """(speed-up, sliced row, dense row, index) of every sliced network that was measured beside a dense one."""
    found = []
    for index, content in _runs(results, kinds):
        for row, dense in sliced_and_dense(content.get("rows", ())):
            found.append((row["tokens_per_second"] / dense["tokens_per_second"], row, dense, index))
    return found


def speed_up(results: Sequence[Mapping]) -> Card | None:
    """The largest over the fastest dense row of the same run, decoding one token after the other, or many at once."""
    speeds = _speeds(results, ("token", "throughput"))
    if not speeds:
        return None
    ratio, row, _, index = max(speeds, key=lambda speed: speed[0])
    how = "batch 1" if row["batch"] == 1 else "the best batches"
    what = f"{plain_label(row)} over dense, {how}, {row['dtype']}, {subject_of(results[index])}"
    return Card("best speed-up", times(ratio), what, index)


def tokens_per_second(results: Sequence[Mapping]) -> Card | None:
    """The most of a sliced network at its batch, beside the dense one's: of throughput runs where there are any."""
    speeds = _speeds(results, ("throughput",)) or _speeds(results, ("token",))
    if not speeds:
        return None
    _, row, dense, index = max(speeds, key=lambda speed: speed[1]["tokens_per_second"])
    rate, beside = row["tokens_per_second"], dense["tokens_per_second"]
    what = f"{plain_label(row)}, batch {row['batch']}, {subject_of(results[index])}; dense {figure(beside)}"
    return Card("tokens/s", figure(rate), what, index)


def kept(results: Sequence[Mapping]) -> tuple[dict, dict, int, str] | None:
    """(sliced row, dense row, index, of what) of the least slicing whose bytes and perplexity are both known."""
    for index, content in _runs(results, ("sizes",)):
        dense = next((row for row in content["rows"] if row["size"] == 1), None)
        sliced = [row for row in content["rows"] if row["size"] < 1]
        if dense and sliced:
            data = content["settings"].get("data")
            what = subject_of(content) + (f", on {data}" if data else "")
            return max(sliced, key=lambda row: row["size"]), dense, index, what
    for index, content in _runs(results, ("demo",)):
        dense, *others = content.get("rows") or [None]
        sliced = [row for row in others if row["model"] != dense["model"]]
        if sliced:
            return max(sliced, key=lambda row: row["bytes"]), dense, index, subject_of(content) or "demo"
    for index, content in _runs(results, ("frontier",)):
        text = next(iter(content["points"][0]["perplexity"]), None) if content.get("points") else None
        points = [point | {"perplexity": point["perplexity"][text]} for point in content.get("points", ())]
        dense = next((point for point in points if point["method"] == "dense"), None)
        ours = [point for point in points if point["method"] == "ours"]
        if dense and ours:
            return max(ours, key=lambda point: point["bytes"]), dense, index, f"on {text}"
    return None


def size_and_quality(results: Sequence[Mapping]) -> list[Card]:
    """Bytes and perplexity of one and the same sliced model, beside the dense one's."""
    found = kept(results)
    if found is None:
        return []
    row, dense, index, what = found
    share = f"{100 * row['bytes'] / dense['bytes']:.0f} % of the dense {format_bytes(dense['bytes'])}"
    beside = f"dense {figure(dense['perplexity'])}; at {format_bytes(row['bytes'])}, {what}"
    return [
        Card("bytes", format_bytes(row["bytes"]), f"{share}, {what}", index),
        Card("perplexity", figure(row["perplexity"]), beside, index),
    ]


def cards_of(results: Sequence[Mapping]) -> list[Card]:
    """The cards that these results have figures for."""
    cards = [speed_up(results), tokens_per_second(results)]
    return [card for card in cards if card is not None] + size_and_quality(results)
