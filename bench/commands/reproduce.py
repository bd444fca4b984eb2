"""The published tables (`published.py`), predicted from bytes and operations, with the error of every row.

Every table is a list of rows and a list of notes, which name the rows that are far off, and why. Fitted are one
efficiency for each device, and one for the products of a layer.
"""

from collections.abc import Iterable, Sequence

from slicegpt.bench.commands.predict import (
    HALF,
    cache_seconds,
    calibrate,
    calibrated_efficiencies,
    fewest_gpus,
    largest_batch,
    published_cost,
    published_step,
)
from slicegpt.bench.commands.published import (
    LAYER_DEVICE,
    LAYER_TIMES,
    LAYER_TOKENS,
    SLICING_DEVICE,
    SLICING_TIMES,
    THROUGHPUT_DEVICE,
    THROUGHPUTS,
    TOKEN_TIMES,
    LayerTime,
    SlicingTime,
)
from slicegpt.bench.models.architectures import sliced_config
from slicegpt.bench.models.devices import DevicePeaks, device_named
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import decoder_parameters

FAR_OFF = 25  # percent: a larger error is explained in a note

# A 2:4 product reads half of the weights, with a two-bit index for each, and does half of the operations.
SPARSE_OPERATIONS, SPARSE_BYTES = 0.5, 0.5 * (1 + 2 / 16)

# Assumed for the slicing runs of the paper, whose table of times does not say.
CALIBRATION_TOKENS = 1024 * 2048


# The device of every table that has a single one.
DEVICE_OF = {
    "throughput": THROUGHPUT_DEVICE,
    "products of one layer": LAYER_DEVICE,
    "slicing": SLICING_DEVICE,
}


def size_name(fraction: float) -> str:
    return f"{100 * fraction:g} %" if fraction else "dense"


def percent_off(predicted: float, published: float) -> float:
    return 100 * (predicted / published - 1)


def token_times() -> tuple[list[dict], list[str]]:
    """Table 2 of the paper, milliseconds per token and number of GPUs; and notes."""
    rows, notes = [], []
    for row in TOKEN_TIMES:
        predicted = 1000 * published_step(row) / calibrated_efficiencies()[row.device]
        gpus = fewest_gpus(published_cost(row.model, row.slice), device_named(row.device))
        rows.append(
            {
                "device": row.device,
                "model": row.model,
                "slice": row.slice,
                "GPUs published": row.gpus,
                "GPUs predicted": gpus,
                "ms published": row.milliseconds,
                "ms predicted": predicted,
                "error %": percent_off(predicted, row.milliseconds),
            }
        )
        if gpus != row.gpus:
            notes.append(
                f"GPUs: {row.model} {size_name(row.slice)} ran on {row.gpus} {row.device}, where the memory of {gpus} "
                "would do if it could be divided evenly; whole layers go to a GPU. One after the other, their number "
                "does not change the predicted time."
            )
    return rows, notes


def throughputs() -> tuple[list[dict], list[str]]:
    """The throughput table: tokens/s at the published batch, and the speed-up over the dense row; and notes."""
    device = device_named(THROUGHPUT_DEVICE)
    efficiency, rows = calibrated_efficiencies()[THROUGHPUT_DEVICE], []
    dense: tuple[float, float] = (1.0, 1.0)
    for row in THROUGHPUTS:
        cost, seconds = published_cost(row.model, row.slice), published_step(row)
        predicted = row.batch / seconds * efficiency
        if row.slice == 0:  # the dense row comes first
            dense = (row.tokens_per_second, predicted)
        published_ratio, ratio = row.tokens_per_second / dense[0], predicted / dense[1]
        rows.append(
            {
                "model": row.model,
                "slice": row.slice,
                "GPUs": row.gpus,
                "batch": row.batch,
                "batch that fits": largest_batch(cost, device, row.gpus, 128),
                "tokens/s published": row.tokens_per_second,
                "tokens/s predicted": predicted,
                "error %": percent_off(predicted, row.tokens_per_second),
                "speed-up published": published_ratio,
                "speed-up predicted": ratio,
                "speed-up error %": percent_off(ratio, published_ratio) if row.slice else None,
                "cache %": 100 * cache_seconds(cost, device, row.batch * 64) / seconds,
                "own efficiency": seconds * row.tokens_per_second / row.batch,
            }
        )
    dense_note = (
        "Speed-ups are over the dense row of the same model, which is 1 by construction and has no error."
    )
    about_columns = (
        '"cache %": of the predicted step, the share that moves the cache and not the weights. "own efficiency": what '
        "would make this row exact."
    )
    return rows, [dense_note, about_columns, *_throughput_notes(rows, efficiency)]


def _throughput_notes(rows: Sequence[dict], efficiency: float) -> list[str]:
    """A note for each class of rows whose tokens/s are far off: bound by reading weights, or by copying the cache."""
    notes = []
    classes = {
        False: "mostly read weights, in products large enough to come nearer to the bandwidth than",
        True: "mostly copy Hugging Face's growing cache, probably more often or slower than the three passes counted "
        "here; they stay below",
    }
    for on_cache, why in classes.items():
        far = [row for row in rows if abs(row["error %"]) > FAR_OFF and (row["cache %"] > 50) == on_cache]
        if not far:
            continue
        batches, own = (
            _span(row["batch"] for row in far),
            _span(round(row["own efficiency"], 2) for row in far),
        )
        notes.append(
            f"Tokens/s off by more than {FAR_OFF} %: {_named(far)}. Batches of {batches} {why} the common "
            f"{efficiency:.2f} ({own}). In a speed-up this mostly cancels."
        )
    return notes


def _named(rows: Iterable[dict]) -> str:
    return ", ".join(f"{row['model']} {size_name(row['slice'])} {row['error %']:+.0f} %" for row in rows)


def _span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def layer_products(config: SlicedConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the products of a layer of constant width, without shortcuts."""
    width, neurons = config.boundary_widths[0], config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    gates = 2 if config.gated_mlp else 1
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, *[(width, neurons)] * gates, (neurons, width)]


def products_seconds(row: LayerTime, device: DevicePeaks) -> float:
    """Seconds of a layer's products at peak rates, each bound by its operations or its bytes."""
    operations, stored = (SPARSE_OPERATIONS, SPARSE_BYTES) if row.sparse else (1, 1)
    seconds = 0.0
    for inputs, outputs in layer_products(sliced_config(row.model, row.slice, "dense", 8)):
        multiplied = operations * 2 * LAYER_TOKENS * inputs * outputs / (device.half * 1e12)
        moved = HALF * (stored * inputs * outputs + LAYER_TOKENS * (inputs + outputs))
        seconds += max(multiplied, moved / (device.bandwidth * 1e9))
    return seconds


def layer_efficiency() -> float:
    """Fitted to the products of dense matrices; 2:4 products use other kernels."""
    device = device_named(LAYER_DEVICE)
    return calibrate(
        (products_seconds(row, device), row.milliseconds / 1000) for row in LAYER_TIMES if not row.sparse
    )


def layer_times() -> tuple[list[dict], list[str]]:
    """The products of one layer, dense, 2:4 and sliced; and notes."""
    device, efficiency, rows, notes = device_named(LAYER_DEVICE), layer_efficiency(), [], []
    dense = (1.0, 1.0)
    for row in LAYER_TIMES:
        predicted = 1000 * products_seconds(row, device) / efficiency
        if not row.slice and not row.sparse:  # it comes first
            dense = (row.milliseconds, predicted)
        form = "2:4" if row.sparse else size_name(row.slice)
        rows.append(
            {
                "model": row.model,
                "layer": form,
                "ms published": row.milliseconds,
                "ms predicted": predicted,
                "error %": percent_off(predicted, row.milliseconds),
                "speed-up published": dense[0] / row.milliseconds,
                "speed-up predicted": dense[1] / predicted,
            }
        )
        if row.sparse:
            notes.append(
                "2:4 halves the operations at most: its prediction keeps the efficiency of dense products, which the "
                f"sparse kernels did not ({dense[0] / row.milliseconds:.2f} x published)."
            )
    notes.append(
        f"One sequence of {LAYER_TOKENS} tokens assumed; shortcuts are not counted, as in the published table. One "
        f"efficiency, {efficiency:.2f}, is fitted to the three rows of dense matrices."
    )
    return rows, notes


def counted_minutes(row: SlicingTime, device: DevicePeaks) -> float:
    """Minutes, at peak rates and full width, of what can be counted in a slicing run of the published code.

    Two forward passes of every layer (one for the stream after attention, one for the output), and the covariance of
    every boundary as a full product in float64. Eigensolver, rotations and copies are not counted.
    """
    config = sliced_config(row.model, 0)
    forward = 2 * 2 * CALIBRATION_TOKENS * decoder_parameters(config) / (device.half * 1e12)
    boundaries = 2 * config.num_hidden_layers + 1
    covariances = boundaries * 2 * CALIBRATION_TOKENS * config.hidden_size**2 / (device.fp64 * 1e12)
    return (forward + covariances) / 60


def slicing_times() -> tuple[list[dict], list[str]]:
    """Slicing on one GPU: published minutes, counted minutes, and a note on why there is no prediction."""
    device = device_named(SLICING_DEVICE)
    rows = [
        {
            "model": row.model,
            "minutes published": row.minutes,
            "minutes predicted": "not predicted",
            "counted at peak": counted_minutes(row, device),
        }
        for row in SLICING_TIMES
    ]
    share = _span(round(100 * row["counted at peak"] / row["minutes published"]) for row in rows)
    note = (
        "Not predicted: what can be counted, two forward passes of every layer and the float64 covariances, 1024 x "
        f"2048 calibration tokens assumed, takes {share} % of the published time at the peaks. The rest is signals "
        "kept on the host, copied there and back by every pass, the eigensolver, rotations and loading; their "
        "rates are not published."
    )
    return rows, [note]


def tables() -> dict[str, tuple[list[dict], list[str]]]:
    """Title of every published table -> its rows and notes."""
    return {
        "time per token": token_times(),
        "throughput": throughputs(),
        "products of one layer": layer_times(),
        "slicing": slicing_times(),
    }


def efficiencies() -> dict[str, float]:
    """Every fitted efficiency."""
    return {**calibrated_efficiencies(), f"{LAYER_DEVICE}, products of a layer": layer_efficiency()}


def calibration_note() -> str:
    fitted = ", ".join(f"{name} {value:.2f}" for name, value in calibrated_efficiencies().items())
    return (
        f"Time per token and throughput: one number a device is fitted to these figures, its efficiency: {fitted}. "
        "The figures ran Hugging Face's eager runtime, over several GPUs one after the other."
    )
