"""What a result says, in sentences that people read first: "25 % sliced: 1.21 × dense"."""

import math
from collections.abc import Callable, Mapping, Sequence

from slicegpt.bench.harness.columns import percent
from slicegpt.bench.harness.comparison import models_of
from slicegpt.bench.report.tables import UNREADABLE, before_and_after, over_unfused
from slicegpt.modeling.sizes import format_bytes


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"


def figure(value: float) -> str:
    """Three digits, whole numbers from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain_label(row: Mapping) -> str:
    """A network's label, "25 % sliced" or "dense", without the dtype, which is told apart."""
    label = row["network"].removesuffix(f", {row.get('dtype')}")
    words = label.split(" ", 1)
    return f"{words[1]} sliced" if words[0] == "sliced" and len(words) == 2 else label


def fastest(rows: Sequence[Mapping], key: str = "tokens_per_second") -> Mapping | None:
    return max((row for row in rows if row.get(key)), key=lambda row: row[key], default=None)


def sliced_and_dense(rows: Sequence[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """Every sliced network's fastest row, with the fastest dense row of the same model and dtype."""
    pairs = []
    for own in models_of(row for row in rows if "dense_parameters" in row):
        dense = fastest([row for row in own if row.get("slice") == 0])
        labels = dict.fromkeys(row["network"] for row in own if row.get("slice") != 0)
        best = [fastest([row for row in own if row["network"] == label]) for label in labels]
        pairs += [(row, dense) for row in best if row is not None and dense is not None]
    return pairs


def _token(content: Mapping) -> list[str]:
    told = []
    for row, dense in sliced_and_dense(content["rows"]):
        ratio = row["tokens_per_second"] / dense["tokens_per_second"]
        allowed = dense["read_bytes"] / row["read_bytes"] if row.get("read_bytes") else None
        bytes_allow = f" (bytes allow {times(allowed)})" if allowed else ""
        rate = f"{figure(row['tokens_per_second'])} tokens/s"
        told.append(f"{plain_label(row)}, {row['dtype']}: {times(ratio)} dense{bytes_allow}, {rate}")
    for row in content.get("ratios") or ():
        if "fused over hf-generate" in row["comparison"]:
            told.append(f"dense, {row['dtype']}: {times(row['ratio'])} Hugging Face's generate()")
    return told


def _throughput(content: Mapping) -> list[str]:
    told = []
    for row, dense in sliced_and_dense(content["rows"]):
        ratio = row["tokens_per_second"] / dense["tokens_per_second"]
        rate = f"{figure(row['tokens_per_second'])} tokens/s at batch {row['batch']}"
        told.append(f"{plain_label(row)}: {times(ratio)} dense, {rate}")
    return told


def _layers(content: Mapping) -> list[str]:
    rows = [row for row in content["rows"] if row.get("layer_ms") and row.get("network")]
    dense = min((row for row in rows if row.get("slice") == 0), key=lambda row: row["layer_ms"], default=None)
    told = []
    for label in dict.fromkeys(row["network"] for row in rows if row.get("slice")):
        row = min((row for row in rows if row["network"] == label), key=lambda row: row["layer_ms"])
        ratio = f"{times(dense['layer_ms'] / row['layer_ms'])} the dense layer, " if dense else ""
        told.append(f"{plain_label(row)}: {ratio}{figure(row['layer_ms'])} ms")
    return told


def _sizes(content: Mapping) -> list[str]:
    rows = content["rows"]
    dense = next((row for row in rows if row["size"] == 1), None)
    told = []
    for row in rows:
        if row is dense:
            continue
        beside = f" (dense {figure(dense['perplexity'])})" if dense else ""
        told.append(
            f"{100 * row['size']:g} % of the parameters: {format_bytes(row['bytes'])}, perplexity "
            f"{figure(row['perplexity'])}{beside}"
        )
    return told


def _frontier(content: Mapping) -> list[str]:
    told = []
    for method, rows in (content.get("comparisons") or {}).items():
        for size in dict.fromkeys(row["size"] for row in rows):
            ratios = ", ".join(percent(row["loss ratio"]) for row in rows if row["size"] == size)
            basis, nominal = size.rsplit(" ", 1)
            what = "the decoder" if basis == "decoder" else "all parameters"
            told.append(
                f"{method}, {100 * float(nominal):g} % of {what}: {ratios} of the published method's loss"
            )
    if told:
        texts = dict.fromkeys(row["text"] for rows in content["comparisons"].values() for row in rows)
        return [f"{told[0]}, on {', '.join(texts)}", *told[1:]]
    points = content["points"]
    dense = next((point for point in points if point["method"] == "dense"), None)
    text = next(iter(points[0]["perplexity"]))
    for point in points:
        if point is not dense and dense is not None:
            share = 100 * point["parameters"] / dense["parameters"]
            given = point.get("calibration")
            method = f"{point['method']} ({given})" if given else point["method"]
            told.append(
                f"{method}, {share:.0f} % of the parameters: perplexity {figure(point['perplexity'][text])} on {text} "
                f"(dense {figure(dense['perplexity'][text])})"
            )
    return told


def _equal_size(content: Mapping) -> list[str]:
    found = {row["shortcuts"]: row["perplexity"] for row in content["rows"]}
    if not {"dense", "compact"} <= set(found):
        return []
    compact, dense = found["compact"], found["dense"]
    return [
        f"compact shortcuts: perplexity {figure(compact)}; dense ones, with as many weights in the layers: "
        f"{figure(dense)}"
    ]


def _recovery(content: Mapping) -> list[str]:
    told = [f"{100 * content['recovered_log_perplexity']:.0f} % of the loss won back"]
    models = [f"{row['model']} {figure(row['perplexity'])}" for row in content["evaluation"]["models"]]
    return [*told, f"perplexity: {', '.join(models)}"]


def _evaluation(content: Mapping) -> list[str]:
    rows = content["rows"]
    told = [
        f"{row['model']}: perplexity {figure(row['perplexity'])}" for row in rows if row.get("perplexity")
    ]
    scored = [row for row in rows if row.get("mean_accuracy") is not None]
    return told + [f"{row['model']}: {row['mean_accuracy']:.1%} of the answers" for row in scored]


def _finetuning(content: Mapping) -> list[str]:
    before, after = (math.exp(content[name]) for name in ("loss_before", "loss_after"))
    return [f"held-out perplexity {figure(before)} before, {figure(after)} after"]


def _slicing(content: Mapping) -> list[str]:
    if not content.get("ratio"):
        return []
    seconds = next((row["seconds"] for row in content["rows"] if row["stage"] == "slicing in all"), None)
    seconds = content.get("slicing_seconds", seconds)
    took = f" ({figure(seconds)} s for {content['tokens']:,} tokens)" if seconds else ""
    return [f"slicing takes {content['ratio']:.2f} dense forward passes{took}"]


def _refit(content: Mapping) -> list[str]:
    without, with_refit = (row["in all"] for row in content["rows"])
    return [
        f"with the refit slicing takes {times(content['ratio'])} as long: {figure(with_refit)} s, not "
        f"{figure(without)} s"
    ]


def _vllm(content: Mapping) -> list[str]:
    first, *others = content["models"]
    return [
        f"{row['model']}: {times(row['speed-up'])} {first['model']}, {figure(row['tokens_per_second'])} tokens/s"
        for row in others
    ]


def _speculative(content: Mapping) -> list[str]:
    return [
        f"{row['draft']}: {times(row['ratio'])} the model alone, {row['accepted']} accepted"
        for row in content["rows"]
        if row["draft"] != "alone"
    ]


def _gram(content: Mapping) -> list[str]:
    told = []
    for row in content["gram"]:
        if row["method"] == "gram_ fp64" or row["method"].startswith("gram_ fast"):
            told.append(
                f"{row['method']}, {row['D']} columns of {row['X']}: {row['of published']:.2f} of the published time"
            )
    return told


def _rotation(content: Mapping) -> list[str]:
    told = []
    for (model, dtype), own in over_unfused(content["rows"]).items():
        low, high = min(own.values()), max(own.values())
        told.append(f"{model}, {dtype}: {low:.2f} to {high:.2f} of unfused torch's time, by rows")
    return told


def _attention(content: Mapping) -> list[str]:
    groups: dict[tuple, dict[str, float]] = {}
    for row in content["rows"]:
        groups.setdefault((row["model"], row["batch"], row["tokens"]), {})[row["by"]] = row["µs a layer"]
    told = []
    for (model, batch, tokens), own in groups.items():
        by = min(own, key=own.get)
        others = [value for name, value in own.items() if name != by]
        if others:
            told.append(
                f"{model}, batch {batch}, {tokens:,} tokens: {by} {times(max(others) / own[by])} the slowest"
            )
    return told


def _predict(content: Mapping) -> list[str]:
    rows = [row for row in content["rows"] if row.get("ms per token")]
    dense = next((row for row in rows if row["slice"] == 0), None)
    return [
        f"{100 * row['slice']:g} % sliced: {times(dense['ms per token'] / row['ms per token'])} dense, "
        f"{figure(row['ms per token'])} ms per token"
        for row in rows
        if dense is not None and row is not dense
    ]


def _published(content: Mapping) -> list[str]:
    told = []
    for title, rows in content.items():
        errors = (
            [
                abs(row["error %"])
                for row in rows
                if isinstance(row, Mapping) and row.get("error %") is not None
            ]
            if isinstance(rows, list)
            else []
        )
        if errors:
            told.append(f"{title}: within {max(errors):.1f} % of the published figures, {len(errors)} rows")
    return told


def _model(content: Mapping) -> list[str]:
    size = content.get("size") or content
    return [
        f"{100 * size['removed']:.1f} % of the parameters removed: {format_bytes(size['bytes'])}, not "
        f"{format_bytes(size['dense_bytes'])}",
        *(
            f"{name} {figure(sliced)} (dense {figure(dense)})"
            for name, sliced, dense in before_and_after(content)
        ),
    ]


def _generation(content: Mapping) -> list[str]:
    rate = content.get("tokens_per_second")  # without the prompt, where the command measured it
    if not rate and content.get("seconds"):
        rate = content["tokens"] / content["seconds"]
    return [f"{figure(rate)} tokens/s, {content['tokens']} tokens"] if rate else []


def _demo(content: Mapping) -> list[str]:
    """A line for each model and what runs it; the speed-up is over the first, Hugging Face's generate()."""
    told = []
    for row in content["rows"]:
        speed = f", {times(row['speedup'])} generate()" if row.get("speedup") not in (None, 1) else ""
        rate = f", {figure(row['tokens_per_second'])} tokens/s" if row.get("tokens_per_second") else ""
        told.append(f"{row['model']}, {row['engine']}: perplexity {figure(row['perplexity'])}{rate}{speed}")
    return told


def _plan(content: Mapping) -> list[str]:
    peaks = [f"{place} {format_bytes(peak)}" for place, peak in content["peak"].items() if peak]
    verdict = "the run fits" if content["fits"] else "the run does not fit"
    return [f"{verdict}: peak of {', '.join(peaks)}"]


def _memory(content: Mapping) -> list[str]:
    found = []
    for row in content["rows"]:
        name = row.get("model", f"{row['width']} columns")
        peak, ratio = format_bytes(row["peak_bytes"]), times(row["planned_over_measured"])
        found.append(f"{name}, {row['layers']} layers: peak {peak}, the plan {ratio} that")
    return found


def _ranks(content: Mapping) -> list[str]:
    ranks = max(row["ranks"] for row in content["rows"])
    return [f"{ranks} ranks: {times(content['speedup'])} as fast as one with as many threads"]


def _ceilings(content: Mapping) -> list[str]:
    rows = [row for row in content["rows"] if row["value"] is not None]
    return [f"{row['ceiling']}: {figure(row['value'])} {row['unit']}" for row in rows]


def _overlap(content: Mapping) -> list[str]:
    rows = content["rows"]
    other = sum(bool(row["differ"] or row["differ without overlap"]) for row in rows)
    return [f"{other} of {len(rows)} networks gave other bits when they were run again"]


def _speedup(content: Mapping) -> list[str]:
    return [
        f"{row['dtype']}, {row['columns']} columns: asked for {times(row['asked'])}, measured {times(row['measured'])}"
        for row in content["rows"]
    ]


def _planes(content: Mapping) -> list[str]:
    return [
        f"{row['model']}, {row['signal']}, {row['dtype']}: {figure(row['planes'])} planes, of Gaussians "
        f"{figure(row['of Gaussians'])}"
        for row in content["rows"]
    ]


def _expert_refit(content: Mapping) -> list[str]:
    return [
        f"{100 * row['keep']:g} % kept, {row['calibration tokens']:,} tokens: {row['against own weights']:+.4f} ± "
        f"{row['standard error']:.4f} nats against their own weights"
        for row in content["rows"]
        if row["penalty"] == 1
    ]


def _rehearsal(content: Mapping) -> list[str]:
    lost = sum(row["lost"] for row in content["rows"])
    return [f"{len(content['rows'])} runs of a phase, {lost} finished steps missing from an archive"]


def _plans(content: Mapping) -> list[str]:
    best = {}
    for row in content["rows"]:
        if row["size"] not in best or row["measured"] < best[row["size"]]["measured"]:
            best[row["size"]] = row
    return [f"{size:g}: best by {row['plan']}, {figure(row['measured'])} nats" for size, row in best.items()]


def _kills(content: Mapping) -> list[str]:
    other = sum(not row["same weights"] for row in content["kills"])
    return [f"{len(content['kills'])} kills, {other} of them in runs that ended with other weights"]


HEADLINES: dict[str, Callable[[Mapping], list[str]]] = {
    "token": _token,
    "throughput": _throughput,
    "layers": _layers,
    "sizes": _sizes,
    "frontier": _frontier,
    "equal size": _equal_size,
    "recovery": _recovery,
    "evaluation": _evaluation,
    "finetuning": _finetuning,
    "slicing": _slicing,
    "plan": _plan,
    "memory": _memory,
    "ranks": _ranks,
    "resume_kills": _kills,
    "refit": _refit,
    "vllm": _vllm,
    "speculative": _speculative,
    "gram": _gram,
    "rotation": _rotation,
    "decode attention": _attention,
    "predict": _predict,
    "published": _published,
    "ceilings": _ceilings,
    "overlap": _overlap,
    "speedup": _speedup,
    "planes": _planes,
    "expert refit": _expert_refit,
    "rehearsal": _rehearsal,
    "plans": _plans,
    "model": _model,
    "slicing record": _model,
    "generation": _generation,
    "demo": _demo,
}


def headlines_of(content: Mapping) -> list[str]:
    """A result's headlines; none of a kind that has none, or of a run that has not come so far."""
    make = HEADLINES.get(content["benchmark"])
    try:
        return make(content) if make else []
    except UNREADABLE:
        return []  # an interrupted run lacks what its headline is about; its tables show what there is
