"""What `bench/gpu.sh` has measured, in one table: every figure beside the ceiling of the same run that bounds it.

    python -m slicegpt.bench.commands.gpu_summary DIR

DIR holds the JSON files of the steps, among them `ceilings.json`. A fraction is of the measured ceiling, not of a data
sheet's figure. "predicted" is what `slicegpt.bench.models.kernel_times` expects with these ceilings.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from slicegpt.bench.harness.columns import rounded
from slicegpt.bench.kernels.bench_attention import MODELS as HEADS
from slicegpt.bench.models.architectures import MODELS
from slicegpt.bench.models.devices import device_of_product
from slicegpt.bench.models.kernel_times import (
    Ceilings,
    Heads,
    attention_seconds,
    gram_seconds,
    product_seconds,
)
from slicegpt.bench.models.network_times import layer_seconds, step_seconds
from slicegpt.bench.models.processors import PROCESSORS
from slicegpt.bench.models.shapes import Launch, launches
from slicegpt.table import fit_text, format_table

COPY, READ = "copy, GB/s", "read, GB/s"
FLOAT64, SYRK = "float64 product, TFLOP/s", "DSYRK, TFLOP/s"
BFLOAT16, INT8 = "bfloat16 product, TFLOP/s", "int8 product, TOP/s"


def over(value: float | None, ceilings: Mapping[str, float], name: str) -> str | None:
    """`value` as a share of a ceiling, in words; None where either is missing."""
    if value is None or not ceilings.get(name):
        return None
    return f"{value / ceilings[name]:.2f} of {name.split(',')[0]}"


def predicted(seconds: float | None, unit: str) -> str | None:
    """A prediction of `slicegpt.bench.models.kernel_times`, in the unit of the figure beside it."""
    return None if seconds is None else f"{seconds * {'ms': 1e3, 'µs': 1e6}[unit]:.4g} {unit}"


def launch_of(row: Mapping) -> Launch | None:
    """The launch that a row of bench_rotation measured; None where it is not among today's."""
    fraction, form = float(row["slice"].split()[0]) / 100, row["shortcut"]
    found = [one for one in launches(row["model"], fraction, form) if one.part == row["part"]]
    return found[0] if found else None


def device_of(row: Mapping, ceilings: Mapping[str, float]) -> Ceilings | None:
    """The device of a row, with what it has reached; None for one that nothing is predicted for."""
    device = device_of_product(row.get("device") or "")
    return Ceilings.of(ceilings, device) if device and device.capability in PROCESSORS else None


def _token(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    rate = row["gigabytes_per_second"]
    return {
        "what": f"{row['network']}, {row['engine']}",
        "figure": f"{row['ms_median']:.4g} ms a token",
        "predicted": predicted(step_prediction(row, ceilings), "ms"),
        "ceiling": over(rate, ceilings, COPY),
        "second": over(rate, ceilings, READ),
    }


def is_predicted(row: Mapping) -> bool:
    """Whether it is of the runtime, on a named shape."""
    usual = row.get("shortcut") in (None, "compact") and row.get("dtype") in (None, "float16", "bfloat16")
    return usual and row.get("shape") in MODELS and row["engine"] == "fused" and row["slice"] is not None


def step_prediction(row: Mapping, ceilings: Mapping[str, float]) -> float | None:
    """Seconds of the runtime's step; None for what is not predicted."""
    device = device_of(row, ceilings)
    if device is None or not is_predicted(row):
        return None
    # On average half of what is generated is in the cache.
    prompt, new = (0, row["seqlen"]) if "seqlen" in row else (row["prompt"], row["tokens"])
    context, length = prompt + new // 2, prompt + new
    overlap = not row.get("serial")
    return step_seconds(row["shape"], row["slice"], row["batch"], context, length, device, overlap)


def _throughput(row: Mapping, ceilings: Mapping[str, float]) -> dict | None:
    if row["tokens_per_second"] is None:
        return None
    seconds = step_prediction(row, ceilings)
    return {
        "what": f"{row['network']}, {row['engine']}, batch {row['batch']}",
        "figure": f"{row['tokens_per_second']:.4g} tokens/s",
        "predicted": None if seconds is None else f"{row['batch'] / seconds:.4g} tokens/s",
    }


def _gram(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    rate, device = row["TFLOP/s"], device_of(row, ceilings)
    size = (row["N"], row["D"], getattr(torch, row["X"]), row["method"])
    return {
        "what": f"{row['N']} x {row['D']} {row['X']}, {row['method']}",
        "figure": f"{row['ms']:.4g} ms",
        # Of normal values: heavy tails take more planes.
        "predicted": predicted(gram_seconds(*size, device), "ms")
        if device and row.get("values") != "heavy"
        else None,
        "ceiling": over(rate, ceilings, SYRK),
        "second": over(rate, ceilings, FLOAT64),
    }


def _rotation(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    few, device = row["T"] <= 16, device_of(row, ceilings)
    launch = launch_of(row) if device and row["method"] == "fused" else None
    seconds = product_seconds(launch, row["T"], device) if launch else None
    return {
        "what": f"{row['model']} {row['slice']} {row['shortcut']}, {row['part']}, T = {row['T']}, {row['method']}",
        "figure": f"{row['cold us']:.4g} µs",
        "predicted": predicted(seconds, "µs"),
        "ceiling": over(row["GB/s"], ceilings, COPY) if few else over(row["TFLOP/s"], ceilings, BFLOAT16),
        "second": f"{row['of library']:.3f} of the library's product" if row.get("of library") else None,
    }


def _layers(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    device, seconds = device_of(row, ceilings), None
    if device is not None and is_predicted(row):
        seconds = layer_seconds(row["shape"], row["slice"], row["batch"], row["seqlen"], device)
    return {
        "what": row["variant"],
        "figure": f"{row['layer_ms']:.4g} ms a layer",
        "predicted": predicted(seconds, "ms"),
    }


def _ceilings(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    value = "not measured" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
    return {"what": row["ceiling"], "figure": value, "ceiling": row["reason"]}


def _overlap(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    return {
        "what": f"{row['shape']}, {100 * row['slice']:.0f} %, batch {row['batch']}",
        "figure": f"{row['differ']} of {row['replays']} replays differ",
    }


def _attention(row: Mapping, ceilings: Mapping[str, float]) -> dict:
    device, seconds = device_of(row, ceilings), None
    if device is not None and row["by"] == "triton":
        heads = HEADS[row["model"]]
        heads = Heads(heads.queries, heads.keys, heads.size, getattr(torch, row["dtype"]).itemsize)
        seconds = attention_seconds(heads, row["batch"], row["tokens"], 2 * row["tokens"], device)
    return {
        "what": f"{row['model']}, batch {row['batch']}, {row['tokens']} tokens, {row['by']}",
        "figure": f"{row['µs a layer']:.4g} µs a layer",
        "predicted": predicted(seconds, "µs"),
        "ceiling": over(row["GB/s"], ceilings, COPY),
    }


def _slicing(row: Mapping, ceilings: Mapping[str, float]) -> dict | None:
    if "stage" not in row:
        return None
    return {"what": row["stage"], "figure": f"{row['seconds']:.4g} s"}


LINES: dict[str, Callable[[Mapping, Mapping[str, float]], dict | None]] = {
    "ceilings": _ceilings,
    "gram": _gram,
    "token": _token,
    "throughput": _throughput,
    "layers": _layers,
    "rotation": _rotation,
    "overlap": _overlap,
    "decode attention": _attention,
    "slicing": _slicing,
}


# What predictions depend on, and rows do not repeat.
SETTINGS = ("shape", "shortcut", "seqlen", "batch", "prompt", "tokens")


def lines(folder: Path) -> Iterator[dict]:
    """A row for every figure in a folder's JSON files; a file that is not a result of this package is left out."""
    for file in sorted(folder.glob("*.json"), key=lambda one: (one.stem != "ceilings", one.name)):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            yield {"step": file.stem, "what": "not readable"}
            continue
        if not isinstance(content, dict):
            continue
        write = LINES.get(content.get("benchmark"))
        if write is None:
            continue
        rows = content["gram"] if content["benchmark"] == "gram" else content["rows"]
        settings = content.get("settings") or {}
        known = {name: settings[name] for name in SETTINGS if name in settings}
        if isinstance(known.get("shape"), list):
            known["shape"] = known["shape"][0] if len(known["shape"]) == 1 else None
        known["serial"] = file.stem.endswith("_serial")
        known["device"] = (content.get("environment") or {}).get("device")
        found = [write({**known, **row}, content.get("ceilings") or {}) for row in rows]
        for row in found:
            if row is not None:
                incomplete = None if content.get("complete", True) else "incomplete"
                yield {"step": file.stem, **row, "state": incomplete}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR")
    options = parser.parse_args()
    rows = list(lines(Path(options.folder)))
    if not rows:
        print(fit_text(f"no result in {options.folder}"))
        sys.exit(1)
    titles = [
        title
        for title in ("step", "what", "figure", "predicted", "ceiling", "second", "state")
        if any(row.get(title) for row in rows)
    ]
    print(
        format_table(
            [
                {
                    title: rounded(row.get(title)) if isinstance(row.get(title), float) else row.get(title)
                    for title in titles
                }
                for row in rows
            ],
            titles,
        )
    )


if __name__ == "__main__":
    main()
