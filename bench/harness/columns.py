"""The columns of every kind of result: keys of its rows, titles, how values are written, and what may be left out.

The terminal's tables and the page of results are made of the same columns.
"""

from collections.abc import Callable, Mapping, Sequence

from slicegpt.modeling.sizes import format_bytes


def percent(value: float) -> str:
    return f"{round(100 * value)} %"  # -0 is 0


def tenths(value: float) -> str:
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    return f"{value:.2f} x"


def rounded(value: float | str) -> float | str:
    """Four digits; text, such as "not measured", as it is."""
    return value if isinstance(value, str) else float(f"{value:.4g}")


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def as_it_is(value: object) -> object:
    return value


def best(seconds: Sequence[float] | float) -> float:
    """The fastest of several runs."""
    return rounded(min(seconds) if isinstance(seconds, Sequence) else seconds)


Column = tuple[str, str, Callable]


def named(*names: str, written: Callable = as_it_is) -> tuple[Column, ...]:
    """Columns whose titles are the keys of their rows."""
    return tuple((name, name, written) for name in names)


# (key of a row, title, how a value is written).
COLUMNS: dict[str, tuple[Column, ...]] = {
    "token": (
        ("network", "network", str),
        ("engine", "engine", str),
        ("ms_median", "ms per token", rounded),
        ("speedup", "speed-up", times),
        ("ms_p10", "p10", rounded),
        ("ms_p90", "p90", rounded),
        ("gpu_ms", "GPU-ms", rounded),
        ("tokens_per_second", "tokens/s", rounded),
        ("bytes", "weights", format_bytes),
        ("gigabytes_per_second", "GB/s", rounded),
        ("bandwidth_fraction", "of bandwidth", percent),
        ("peak_bytes", "peak memory", format_bytes),
        ("prompt_ms", "prompt ms", rounded),
    ),
    "throughput": (
        ("network", "network", str),
        ("engine", "engine", str),
        ("tokens_per_second", "tokens/s", rounded),
        ("speedup", "speed-up", times),
        ("batch", "at batch", int),
        ("bytes", "weights", format_bytes),
        ("peak_bytes", "memory there", format_bytes),
        ("largest_batch", "largest batch", int),
    ),
    "layers": (
        ("variant", "layer", str),
        ("total_ms", "sum ms", rounded),
        ("layer_ms", "whole layer ms", rounded),
        ("difference", "difference", percent),
        ("shortcut_ms", "of which shortcuts", rounded),
        ("speedup", "speed-up", times),
    ),
    "ratios": (
        ("comparison", "speed-up of", str),
        ("dtype", "dtype", str),
        ("ratio", "measured", times),
        ("bytes_ratio", "bytes allow", times),
    ),
    "agreement": (
        ("result", "result", str),
        ("ratio of", "ratio of", str),
        ("first", "first", times),
        ("second", "second", times),
        ("apart", "apart", tenths),
    ),
    "slicing": (
        ("stage", "stage", str),
        ("seconds", "seconds", rounded),
        ("of_dense_pass", "of a dense pass", rounded),
    ),
    "predict": (
        *named("model", "slice", "width", "GB", "GPUs"),
        ("fits", "fits", yes_or_no),
        *named("ms per token", "GPU-ms per token", "largest batch", "tokens/s"),
    ),
    "gram": (
        ("D", "D", int),
        ("N", "N", int),
        ("X", "X", str),
        ("method", "method", str),
        ("ms", "ms", rounded),
        ("of published", "of published", rounded),
        ("of float64 product", "of float64 product", rounded),
        ("TFLOP/s", "TFLOP/s", rounded),
        ("bound", "bound", str),
        ("extra MiB", "extra MiB", rounded),
    ),
    "eigensolver": (("D", "D", int), ("solver", "solver", str), ("ms", "ms", rounded)),
    "gram predictions": (
        ("device", "device", str),
        *(
            (f"gram_ {precision}: {kind} ms", f"{precision}, {kind} ms", rounded)
            for precision in ("fp64", "exact", "fast")
            for kind in ("predicted", "measured")
        ),
    ),
    "ceilings": (
        *named("ceiling", "value", "unit", written=rounded),
        ("reason", "not measured", str),
    ),
    "planes": (
        *named("model", "signal", "dtype", "tokens", "columns"),
        ("planes", "planes", rounded),
        ("least", "least", rounded),
        ("most", "most", rounded),
        ("of Gaussians", "of Gaussians", rounded),
        ("handed over", "handed over", tenths),
    ),
    "overlap": named("shape", "slice", "batch", "layers", "replays", "differ", "differ without overlap"),
    "decode attention": (
        ("model", "model", str),
        ("batch", "batch", int),
        ("tokens", "tokens", int),
        ("dtype", "dtype", str),
        ("by", "by", str),
        ("µs a layer", "µs a layer", rounded),
        ("GB/s", "GB/s", rounded),
    ),
    "rotation": (
        *named("model", "slice", "shortcut", "part", "T", "dtype", "method"),
        ("cold us", "cold µs", rounded),
        ("warm us", "warm µs", rounded),
        ("of unfused", "of unfused", rounded),
        ("of plain", "of plain", rounded),
        ("of library", "of library", rounded),
        ("TFLOP/s", "TFLOP/s", rounded),
        ("GB/s", "GB/s", rounded),
        ("bound", "bound", str),
        ("error", "error", rounded),
        ("correct", "correct", yes_or_no),
    ),
    "sizes": (
        ("size", "size", percent),
        ("bytes", "weights", format_bytes),
        ("perplexity", "perplexity", rounded),
        ("tokens_per_second_float32", "tokens/s float32", rounded),
        ("tokens_per_second_bfloat16", "tokens/s bfloat16", rounded),
        ("slicing_seconds", "seconds to slice", rounded),
        ("width", "width", int),
        ("neurons", "neurons", str),
    ),
    "vllm": (
        ("model", "model", str),
        ("architecture", "architecture", str),
        ("parameters", "parameters", int),
        ("bytes", "weights", format_bytes),
        ("tokens_per_second", "tokens/s", rounded),
        ("decode_tokens_per_second", "decoding tokens/s", rounded),
        ("speed-up", "speed-up", times),
        ("prefill_seconds", "prompts, s", best),
        ("seconds", "in all, s", best),
    ),
    "speculative": (
        ("draft", "draft", str),
        ("accepted", "accepted", str),
        ("tokens a pass", "tokens a pass", rounded),
        ("tokens/s", "tokens/s", rounded),
        ("ratio", "speed-up", times),
        ("differing", "prompts that differ", int),
    ),
    "equal size": (
        ("shortcuts", "shortcuts", str),
        ("width", "width", int),
        ("layer weights", "weights of the layers", int),
        ("parameters", "parameters", int),
        ("perplexity", "perplexity", rounded),
    ),
    "comparison": (
        ("size", "size", str),
        ("text", "text", str),
        ("dense", "dense", rounded),
        ("published", "published", rounded),
        ("at", "its width", str),
        ("method", "method", str),
        ("perplexity", "perplexity", rounded),
        ("width", "width", str),
        ("loss ratio", "loss of published", rounded),
        ("target", "target", rounded),
        ("met", "met", str),
    ),
    "evaluation": (
        ("model", "model", str),
        ("parameters", "parameters", int),
        ("dtype", "dtype", str),
        ("perplexity", "perplexity", rounded),
        ("mean_accuracy", "mean accuracy", tenths),
        ("tokens", "tokens", int),
        ("seconds", "seconds", rounded),
    ),
    "demo": (
        ("model", "model", str),
        ("engine", "runs in", str),
        ("bytes", "weights", format_bytes),
        ("perplexity", "perplexity", rounded),
        ("tokens_per_second", "tokens/s", rounded),
        ("speedup", "speed-up", times),
    ),
    "kernel": (
        ("name", "benchmark", str),
        ("median", "median ms", rounded),
        ("min", "least ms", rounded),
        ("rounds", "rounds", int),
    ),
    "tuned": (
        *named("op", "dtype", "rows", "columns", "inner"),
        ("microseconds", "µs", rounded),
        ("config", "configuration", str),
    ),
}

# Titles of the columns that a narrow terminal leaves out, the least important first; a JSON file has them all.
SECONDARY: dict[str, tuple[str, ...]] = {
    "token": (
        *("prompt ms", "p10", "p90", "peak memory", "GPU-ms", "GB/s", "of bandwidth", "weights"),
        "tokens/s",
    ),
    "throughput": ("largest batch", "memory there", "weights", "at batch"),
    "layers": ("of which shortcuts", "difference"),
    "predict": ("GPU-ms per token", "width", "largest batch", "GPUs"),
    "gram": ("extra MiB", "of float64 product", "TFLOP/s", "N", "bound"),
    "decode attention": ("dtype",),
    "rotation": (
        *("correct", "error", "warm µs", "GB/s", "TFLOP/s", "of plain", "bound", "shortcut", "dtype"),
        "part",
    ),
    "sizes": ("neurons", "seconds to slice", "width"),
    "vllm": ("in all, s", "prompts, s", "parameters", "weights", "architecture"),
    "comparison": ("its width", "width", "target", "met", "dense"),
    "tuned": ("TFLOP/s", "group", "stages", "warps", "untuned us"),
}


def columns_of(kind: str, rows: Sequence[Mapping]) -> list[Column]:
    """A kind's columns that any row has a value of, and for sizes a column for each task."""
    columns = list(COLUMNS[kind])
    if kind == "sizes":
        known = {key for key, _, _ in columns}
        tasks = dict.fromkeys(key for row in rows for key in row if key not in known)
        columns[3:3] = [(task, task, tenths) for task in tasks]  # behind the perplexity
    return [column for column in columns if any(row.get(column[0]) is not None for row in rows)]


def table(kind: str, rows: Sequence[Mapping]) -> tuple[list[str], list[list[object]]]:
    """Titles, and the cells of every row: text, numbers, or None where nothing was measured.

    Columns without any value are omitted.
    """
    columns = columns_of(kind, rows)
    cells = [
        [None if row.get(key) is None else written(row[key]) for key, _, written in columns] for row in rows
    ]
    return [title for _, title, _ in columns], cells
