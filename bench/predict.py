"""What a device can do on paper: time per token, throughput and the largest batch, from bytes, operations and memory.

A decoding step of `batch` sequences with `context` tokens in the cache reads every weight once and the cache as often
as the runtime makes it, and multiplies every weight with every sequence:

    weights    = max(weight bytes / bandwidth, 2 * weights * batch / peak)
    attention  = cache bytes * passes / bandwidth + 4 * batch * context * heads * head_dim * layers / peak
    step       = (weights + attention) / efficiency

Several GPUs hold consecutive layers and work one after the other, as the published runs did: memory adds up, speed
does not. What lies between the kernels (launches, Python, copies between GPUs) is in the one efficiency of a device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from slicegpt.bench.devices import Device, device_named
from slicegpt.bench.models import sliced_config
from slicegpt.bench.published import THROUGHPUT_DEVICE, THROUGHPUTS, TOKEN_TIMES
from slicegpt.modeling import SlicedConfig
from slicegpt.sizes import decoder_parameters, stored_parameters

HALF = 2  # bytes: every prediction is for float16 or bfloat16 weights and cache

# What the CUDA context, the allocator's fragments and cuBLAS workspaces take on every GPU.
RESERVED_BYTES = 1 << 30

# Memory-bound steps of a good runtime: full stacks reach 55 to 80 % of the bandwidth. Used where a device has no
# published figure to calibrate against; the answer says so.
ASSUMED_EFFICIENCY = 0.7

RUNTIMES = ("fused", "eager")


@dataclass(frozen=True)
class Load:
    """What a model costs.

    Attributes:
        stored_bytes: of all weights, as kept in memory.
        read_weights: elements that one step reads: layers and head, not the embedding rows.
        cache_bytes: keys and values of one token, all layers.
        cache_passes: how often a step moves the cache's bytes through memory.
        attention_operations: of one step for each token in the cache.
        activation_bytes: of one sequence in a step: logits in float32, and the widest layer.
    """

    stored_bytes: int
    read_weights: int
    cache_bytes: int
    cache_passes: float
    attention_operations: int
    activation_bytes: int


def load_of(config: SlicedConfig, runtime: str = "fused") -> Load:
    """The costs of a model under a runtime.

    "fused" reads the cache in place. "eager" is transformers' dynamic cache with unfused attention, what the published
    figures were measured with: each step copies the cache to append to it (read and written), copies it once more
    for each query head of a group where heads are grouped, and attention reads that.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    passes = 1.0
    if runtime == "eager":
        groups = heads // kv_heads
        passes = 2 + (1 + 2 * groups if groups > 1 else 1)
    layers, width = config.num_hidden_layers, config.head_dim
    return Load(
        stored_bytes=stored_parameters(config) * HALF,
        read_weights=decoder_parameters(config) + config.vocab_size * config.hidden_size,
        cache_bytes=2 * layers * kv_heads * width * HALF,
        cache_passes=passes,
        attention_operations=4 * layers * heads * width,
        activation_bytes=4 * config.vocab_size + 2 * HALF * config.intermediate_size,
    )


def step_seconds(load: Load, device: Device, batch: int, context: float) -> float:
    """Seconds of one decoding step at the device's peaks (efficiency 1)."""
    bandwidth, peak = device.bandwidth * 1e9, device.half * 1e12
    weights = max(load.read_weights * HALF / bandwidth, 2 * load.read_weights * batch / peak)
    cached = batch * context
    return (
        weights
        + load.cache_bytes * load.cache_passes * cached / bandwidth
        + load.attention_operations * cached / peak
    )


def usable_bytes(device: Device, gpus: int) -> float:
    return gpus * (device.memory * 2**30 - RESERVED_BYTES)


def fewest_gpus(load: Load, device: Device, length: int = 128) -> int:
    """How many GPUs hold the weights and one sequence."""
    needed = load.stored_bytes + load.cache_bytes * length + load.activation_bytes
    return math.ceil(needed / usable_bytes(device, 1))


def largest_batch(load: Load, device: Device, gpus: int, length: int) -> int:
    """The largest power of two of sequences of `length` tokens that fits; 0 where the weights do not."""
    free = usable_bytes(device, gpus) - load.stored_bytes
    # The appended copy of the cache lives beside the old one for a layer at a time, which is small; the copies for
    # grouped heads too.
    fits = int(free // (load.cache_bytes * length + load.activation_bytes))
    return 2 ** (fits.bit_length() - 1) if fits > 0 else 0


def calibrate(pairs: Iterable[tuple[float, float]]) -> float:
    """The one efficiency that makes predicted seconds closest to measured ones: their geometric mean ratio.

    Args:
        pairs: (seconds at the device's peaks, seconds measured).
    """
    logs = [math.log(ideal / measured) for ideal, measured in pairs]
    return math.exp(sum(logs) / len(logs))


@lru_cache
def published_load(model: str, fraction: float) -> Load:
    """The costs of the published form: dense shortcuts, widths of eights, eager."""
    return load_of(sliced_config(model, fraction, "dense", 8), "eager")


def _published_step(row, device: Device) -> float:
    """Seconds at peak of a published row's step."""
    load = published_load(row.model, row.slice)
    return step_seconds(load, device, getattr(row, "batch", 1), context=64)  # on average, of 128 tokens


def calibrated_efficiencies() -> dict[str, float]:
    """One efficiency a device, from the published figures measured on it."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in TOKEN_TIMES:
        ideal = _published_step(row, device_named(row.device))
        pairs.setdefault(row.device, []).append((ideal, row.milliseconds / 1000))
    for row in THROUGHPUTS:
        ideal = _published_step(row, device_named(THROUGHPUT_DEVICE))
        pairs.setdefault(THROUGHPUT_DEVICE, []).append((ideal, row.batch / row.tokens_per_second))
    return {name: calibrate(values) for name, values in pairs.items()}


def reproduce_token_times() -> list[dict]:
    """Table 2 of the paper: published, predicted, and the error, with one calibrated efficiency a device."""
    efficiencies, rows = calibrated_efficiencies(), []
    for row in TOKEN_TIMES:
        device = device_named(row.device)
        load = published_load(row.model, row.slice)
        predicted = 1000 * _published_step(row, device) / efficiencies[row.device]
        rows.append(
            {
                "device": row.device,
                "model": row.model,
                "slice": row.slice,
                "GPUs published": row.gpus,
                "GPUs predicted": fewest_gpus(load, device),
                "ms published": row.milliseconds,
                "ms predicted": predicted,
                "error %": 100 * (predicted / row.milliseconds - 1),
            }
        )
    return rows


def reproduce_throughputs() -> list[dict]:
    """The throughput table: tokens/s at the published batch, and the speed-up over the dense row."""
    device = device_named(THROUGHPUT_DEVICE)
    efficiency, rows = calibrated_efficiencies()[THROUGHPUT_DEVICE], []
    dense: tuple[float, float] = (1.0, 1.0)
    for row in THROUGHPUTS:
        load = published_load(row.model, row.slice)
        predicted = row.batch / _published_step(row, device) * efficiency
        if row.slice == 0:  # the dense row comes first
            dense = (row.tokens_per_second, predicted)
        published_ratio, ratio = row.tokens_per_second / dense[0], predicted / dense[1]
        rows.append(
            {
                "model": row.model,
                "slice": row.slice,
                "GPUs": row.gpus,
                "batch": row.batch,
                "batch that fits": largest_batch(load, device, row.gpus, 128),
                "tokens/s published": row.tokens_per_second,
                "tokens/s predicted": predicted,
                "speed-up published": published_ratio,
                "speed-up predicted": ratio,
                "error %": 100 * (ratio / published_ratio - 1),
            }
        )
    return rows


def predict(
    name: str,
    fraction: float,
    device: Device,
    gpus: int | None = None,
    *,
    shortcut: str = "compact",
    runtime: str = "fused",
    batch: int = 1,
    length: int = 128,
    efficiency: float | None = None,
) -> dict:
    """Time per token and throughput of a named model at a slicing fraction, as one row of a table.

    Args:
        gpus: how many hold the model; None takes the fewest that do.
        batch, length: sequences, and tokens of each at the end; the cache holds half of `length` on average.
        efficiency: of the peaks; None takes `ASSUMED_EFFICIENCY`.
    """
    config = sliced_config(name, fraction, shortcut)
    load = load_of(config, runtime)
    gpus = gpus or fewest_gpus(load, device, length)
    factor = 1 / (ASSUMED_EFFICIENCY if efficiency is None else efficiency)
    most = largest_batch(load, device, gpus, length)
    row = {
        "model": name,
        "slice": fraction,
        "width": config.boundary_widths[0],
        "GB": load.stored_bytes / 1e9,
        "GPUs": gpus,
        "fits": most >= batch,
        "ms per token": None,
        "GPU-ms per token": None,
        "largest batch": most,
        "tokens/s": None,
    }
    if most >= batch:
        milliseconds = 1000 * step_seconds(load, device, batch, length / 2) * factor
        row["ms per token"], row["GPU-ms per token"] = milliseconds, milliseconds * gpus
    if most:
        row["tokens/s"] = most / (step_seconds(load, device, most, length / 2) * factor)
    return row
