"""Predictions for a device: time per token, throughput and largest batch, from bytes, operations and memory.

A decoding step of `batch` sequences with `context` tokens in the cache reads every weight once, reads the cache once or
more, depending on the runtime, and multiplies every weight with every sequence:

    weights    = max(weight bytes / bandwidth, 2 * weights * batch / peak)
    attention  = cache bytes * passes / bandwidth + 4 * batch * context * heads * head_dim * layers / peak
    step       = (weights + attention) / efficiency

Several GPUs hold consecutive layers and run one after the other, as in the published runs: memory adds up, speed does
not. All time between kernels (launches, Python, copies between GPUs) is part of the single efficiency of a device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from slicegpt.bench.commands.published import (
    THROUGHPUT_DEVICE,
    THROUGHPUTS,
    TOKEN_TIMES,
    Throughput,
    TokenTime,
)
from slicegpt.bench.models.architectures import sliced_config
from slicegpt.bench.models.devices import DevicePeaks, device_named
from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import decoder_parameters, stored_parameters

HALF = 2  # bytes of a float16 or bfloat16 number

# Taken by the CUDA context, the allocator's fragmentation and cuBLAS workspaces on every GPU, by Python on a CPU.
RESERVED_BYTES = 1 << 30

# For memory-bound steps, good runtimes reach 55 to 80 % of the bandwidth. Used where a device has no published figure
# to calibrate with; the result says so.
ASSUMED_EFFICIENCY = 0.7


@dataclass(frozen=True)
class DecodingCost:
    """What decoding with a model takes: bytes and operations.

    Attributes:
        stored_bytes: of all weights, as kept in memory.
        read_weights: elements that one step reads: layers and head, not the rows of the embedding.
        cache_bytes: keys and values of one token, all layers.
        cache_passes: how many times a step moves the cache through memory.
        attention_operations: of one step, for each token in the cache.
        activation_bytes: of one sequence in a step: logits in float32, and the widest layer.
        itemsize: bytes of a weight and of a cached value.
    """

    stored_bytes: int
    read_weights: int
    cache_bytes: int
    cache_passes: float
    attention_operations: int
    activation_bytes: int
    itemsize: int = HALF


def cost_of(config: SlicedConfig, runtime: str = "fused", itemsize: int = HALF) -> DecodingCost:
    """The costs of a model in a runtime, with `itemsize` bytes for each weight and cached value.

    "fused" reads the cache in place. "eager" is transformers' dynamic cache with unfused attention, as in the published
    measurements: each step copies the cache to append to it (a read and a write), repeats it for each query head of a
    group where heads are grouped, and attention reads the result.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    passes = 1.0
    if runtime == "eager":
        groups = heads // kv_heads
        passes = 2 + (1 + 2 * groups if groups > 1 else 1)
    width = config.head_dim
    return DecodingCost(
        stored_bytes=stored_parameters(config) * itemsize,
        read_weights=decoder_parameters(config) + config.vocab_size * config.hidden_size,
        cache_bytes=2 * sum(config.key_value_heads) * width * itemsize,
        cache_passes=passes,
        attention_operations=4 * sum(config.attention_heads) * width,
        activation_bytes=4 * config.vocab_size + 2 * itemsize * config.intermediate_size,
        itemsize=itemsize,
    )


def step_seconds(cost: DecodingCost, device: DevicePeaks, batch: int, context: float) -> float:
    """Seconds of one decoding step at the device's peaks (efficiency 1)."""
    return weight_seconds(cost, device, batch) + cache_seconds(cost, device, batch * context)


def peak_of(cost: DecodingCost, device: DevicePeaks) -> float:
    """Operations per second in the model's precision."""
    return 1e12 * (device.half if cost.itemsize == HALF else device.fp32)


def weight_seconds(cost: DecodingCost, device: DevicePeaks, batch: int) -> float:
    """Of a step: reading every weight once or multiplying it with every sequence, whichever takes longer."""
    read = cost.read_weights * cost.itemsize / (device.bandwidth * 1e9)
    return max(read, 2 * cost.read_weights * batch / peak_of(cost, device))


def cache_seconds(cost: DecodingCost, device: DevicePeaks, cached: float) -> float:
    """Of a step: attention over `cached` tokens in the cache, summed over the sequences."""
    moved = cost.cache_bytes * cost.cache_passes * cached / (device.bandwidth * 1e9)
    return moved + cost.attention_operations * cached / peak_of(cost, device)


def usable_bytes(device: DevicePeaks, gpus: int) -> float:
    return gpus * (device.memory * 2**30 - RESERVED_BYTES)


def fewest_gpus(cost: DecodingCost, device: DevicePeaks, length: int = 128) -> int:
    """The number of GPUs whose memory holds the weights and one sequence of `length` tokens."""
    needed = cost.stored_bytes + cost.cache_bytes * length + cost.activation_bytes
    return math.ceil(needed / usable_bytes(device, 1))


def largest_batch(cost: DecodingCost, device: DevicePeaks, gpus: int, length: int) -> int:
    """The largest power of two of sequences of `length` tokens that fits; 0 where none does."""
    free = usable_bytes(device, gpus) - cost.stored_bytes
    # The copies of the cache in the eager runtime exist for one layer at a time, which is small.
    fits = int(free // (cost.cache_bytes * length + cost.activation_bytes))
    return 2 ** (fits.bit_length() - 1) if fits > 0 else 0


def calibrate(pairs: Iterable[tuple[float, float]]) -> float:
    """The single efficiency that brings predictions closest to measurements: the geometric mean of their ratios.

    Args:
        pairs: (seconds at the device's peaks, seconds measured).
    """
    logs = [math.log(ideal / measured) for ideal, measured in pairs]
    return math.exp(sum(logs) / len(logs))


@lru_cache
def published_cost(model: str, fraction: float) -> DecodingCost:
    """The costs of the published form: dense shortcuts, widths of eights, eager."""
    return cost_of(sliced_config(model, fraction, "dense", 8), "eager")


def published_batch(row: TokenTime | Throughput) -> int:
    return row.batch if isinstance(row, Throughput) else 1


def published_step(row: TokenTime | Throughput) -> float:
    """Seconds of a published row's step at peak rates; on average half of its 128 tokens are in the cache."""
    device = row.device if isinstance(row, TokenTime) else THROUGHPUT_DEVICE
    return step_seconds(
        published_cost(row.model, row.slice), device_named(device), published_batch(row), context=64
    )


def published_rows() -> dict[str, list[tuple[TokenTime | Throughput, float]]]:
    """Device -> the published rows that were measured on it, each with the seconds of a step."""
    rows: dict[str, list] = {}
    for row in TOKEN_TIMES:
        rows.setdefault(row.device, []).append((row, row.milliseconds / 1000))
    for row in THROUGHPUTS:
        rows.setdefault(THROUGHPUT_DEVICE, []).append((row, row.batch / row.tokens_per_second))
    return rows


@lru_cache
def calibrated_efficiencies() -> dict[str, float]:
    """Device -> its efficiency, fitted to the published figures measured on it."""
    return {
        name: calibrate((published_step(row), measured) for row, measured in rows)
        for name, rows in published_rows().items()
    }


@dataclass(frozen=True)
class Efficiency:
    """A fraction of a device's peaks, and its origin in words."""

    value: float
    origin: str


def efficiency_of(device: DevicePeaks, runtime: str, given: float | None = None) -> Efficiency:
    """The given one; else, for the eager runtime, the one fitted to published figures; else an assumption."""
    if given is not None:
        return Efficiency(given, "as given")
    if runtime == "eager" and device.name in calibrated_efficiencies():
        batches = sorted({published_batch(row) for row, _ in published_rows()[device.name]})
        span = f"{batches[0]}" if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"
        figures = f"{len(published_rows()[device.name])} published figures of this device"
        origin = f"fitted to {figures}, float16, batch {span}, Hugging Face's eager runtime"
        return Efficiency(calibrated_efficiencies()[device.name], origin)
    return Efficiency(ASSUMED_EFFICIENCY, "assumed, not measured")


def predict(
    name: str,
    fraction: float,
    device: DevicePeaks,
    gpus: int | None = None,
    *,
    shortcut: str = "compact",
    runtime: str = "fused",
    batch: int = 1,
    length: int = 128,
    efficiency: float | None = None,
    itemsize: int = HALF,
) -> dict:
    """Time per token and throughput of a named model at a slicing fraction, as one row of a table.

    Args:
        gpus: how many hold the model; None takes the fewest. A CPU is one device.
        batch, length: sequences, and tokens of each at its end; on average the cache holds half of `length`.
        efficiency: fraction of the peaks; None takes that of `efficiency_of`.
        itemsize: bytes of a weight and of a cached value.

    Raises:
        SliceGPTError: the model is unknown, or several GPUs are asked for on a CPU.
    """
    on_cpu = device.capability is None
    if on_cpu and (gpus or 1) > 1:
        raise SliceGPTError(f"--gpus: must be 1 (or not given) where --device is cpu, got {gpus}")
    config = sliced_config(name, fraction, shortcut)
    cost = cost_of(config, runtime, itemsize)
    gpus = gpus or (1 if on_cpu else fewest_gpus(cost, device, length))
    factor = 1 / efficiency_of(device, runtime, efficiency).value
    most = largest_batch(cost, device, gpus, length)
    row = {
        "model": name,
        "slice": fraction,
        "width": config.boundary_widths[0],
        "GB": cost.stored_bytes / 1e9,
        "GPUs": None if on_cpu else gpus,
        "fits": most >= batch,
        "ms per token": None,
        "GPU-ms per token": None,
        "largest batch": most,
        "tokens/s": None,
    }
    if most >= batch:
        milliseconds = 1000 * step_seconds(cost, device, batch, length / 2) * factor
        row["ms per token"] = milliseconds
        row["GPU-ms per token"] = None if on_cpu else milliseconds * gpus
    if most:
        row["tokens/s"] = most / (step_seconds(cost, device, most, length / 2) * factor)
    return row
