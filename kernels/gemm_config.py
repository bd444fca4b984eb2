"""Launch configurations of the fused GEMMs: pure functions of device, dtype and sizes.

A measurement on a device of the same compute capability decides where one is near: `tuned_sm<capability>.json`, which
`bench/kernels/tune_rotation.py` writes. Elsewhere a rough model of the launch picks among the same candidates; such a
choice is reasoned, not tuned.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceClass:
    """What configurations depend on; shared_bytes: the most that one block may have."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class GemmConfig:
    """Launch configuration of a persistent GEMM.

    Attributes:
        block_m, block_n: the tile of the accumulator; a gated tile gives half as many columns of output.
        block_k: columns of the operands that a pipeline stage holds.
        num_warps, num_stages: of a program, and of its software pipeline.
        group_m: rows of tiles that pass over the weight together, which then comes from L2.
        programs_per_sm: persistent programs on a multiprocessor.
        tma: read operands with TMA where their layout allows it.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    programs_per_sm: int = 1
    tma: bool = False


# (block_m, block_n, block_k in bytes, num_warps, programs_per_sm). An accumulator takes at most 128 registers a thread,
# 64 where mma.sync keeps operands in registers too. wgmma multiplies 64 rows a warpgroup; fewer run on mma.sync.
_CANDIDATES = (
    (128, 256, 128, 8, 1),
    (128, 128, 128, 8, 1),
    (128, 128, 128, 4, 2),
    (64, 256, 128, 4, 1),
    (64, 128, 128, 4, 1),
    (64, 128, 128, 4, 2),
    (64, 64, 256, 4, 1),
    (64, 64, 128, 4, 2),
    (64, 32, 256, 4, 2),
    (32, 128, 256, 4, 1),
    (32, 64, 256, 4, 1),
    (32, 32, 256, 4, 2),
    (16, 128, 256, 4, 1),
    (16, 64, 256, 4, 2),
    (16, 32, 512, 4, 2),
)
MIN_STAGES, MAX_STAGES = 3, 6


def norm_linear_config(
    device: DeviceClass, dtype: torch.dtype, rows: int, columns: int, inner: int, gated: bool
) -> GemmConfig:
    """columns: rows of the weight, gate and up and z columns together."""
    return _choose(device, dtype, "norm_linear_gated" if gated else "norm_linear", rows, columns, inner)


def rotate_add_config(
    device: DeviceClass, dtype: torch.dtype, rows: int, columns: int, inner: int, dense: bool
) -> GemmConfig:
    """inner: the columns of both sources together where the shortcut is dense."""
    return _choose(device, dtype, "rotate_add_dense" if dense else "rotate_add", rows, columns, inner)


@lru_cache(maxsize=4096)
def _choose(
    device: DeviceClass, dtype: torch.dtype, op: str, rows: int, columns: int, inner: int
) -> GemmConfig:
    table = tuned_table(device.capability)
    found = nearest_tuned(table, device, dtype, op, rows, columns, inner)
    if found is not None:
        return found
    options = candidates(device, dtype)
    return min(options, key=lambda config: predicted_cycles(config, device, dtype, rows, columns, inner))


# --- candidates ---------------------------------------------------------------------------------------------


@lru_cache
def candidates(device: DeviceClass, dtype: torch.dtype) -> tuple[GemmConfig, ...]:
    """What can be launched on the device: each tile shape with as many stages as its shared memory holds."""
    fitting = []
    for block_m, block_n, k_bytes, num_warps, programs in _CANDIDATES:
        if dtype == torch.float32:
            # The three tf32 products keep both parts of an operand in registers, of both operands with mma.sync.
            block_n, k_bytes = max(32, block_n // (2 if device.capability >= (9, 0) else 4)), 128
        if device.capability < (9, 0) and block_m * block_n > 64 * 32 * num_warps:
            num_warps, programs = 8, 1  # 256 threads of up to 255 registers fill a processor
        config = GemmConfig(
            block_m, block_n, k_bytes // dtype.itemsize, num_warps, 1, programs_per_sm=programs,
            tma=device.capability >= (9, 0),
        )  # fmt: skip
        for stages in range(MAX_STAGES, MIN_STAGES - 1, -1):
            config = replace(config, num_stages=stages)
            if fits(config, device, dtype):
                fitting.append(config)
                break
    return tuple(dict.fromkeys(fitting))


def fits(config: GemmConfig, device: DeviceClass, dtype: torch.dtype) -> bool:
    """Whether a multiprocessor holds the programs that the configuration puts on it; each has 1 KiB of its own."""
    return config.programs_per_sm * (shared_bytes(config, device, dtype) + 1024) <= device.shared_bytes + 1024


def shared_bytes(config: GemmConfig, device: DeviceClass, dtype: torch.dtype) -> int:
    """Shared memory of one program: the operands' stages, and half an output tile on its way to coalesced stores."""
    stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    # wgmma reads a stage while the next ones arrive; mma.sync has it in registers by then, but for float32 as some
    # releases of triton compile it.
    reads_memory = device.capability >= (9, 0) and config.block_m >= 64
    buffers = config.num_stages - (0 if reads_memory or dtype == torch.float32 else 1)
    return buffers * stage + max(4096, config.block_m * config.block_n // 2 * dtype.itemsize) + 512


# --- the model ----------------------------------------------------------------------------------------------

# Per processor and cycle: half-precision multiply-adds of the tensor cores, and bytes that L2 delivers.
_MULTIPLY_ADDS = {8: 1024, 9: 2048, 10: 4096, 12: 1024}
_CONSUMER = {(8, 6), (8, 9), (12, 0)}  # half of the rate when float32 accumulates
_L2_BYTES = 48
_LATENCY = 1200  # cycles until a byte from memory arrives
_TILE_OVERHEAD = 1500  # cycles to fill the pipeline and to store a tile
_MEMORY_BYTES = 12  # device memory delivers, per processor and cycle of all of them


def predicted_cycles(
    config: GemmConfig, device: DeviceClass, dtype: torch.dtype, rows: int, columns: int, inner: int
) -> float:
    """Cycles that a launch takes, roughly: the longest of arithmetic, operand traffic and memory, in whole waves."""
    rate = _MULTIPLY_ADDS.get(device.capability[0], 1024) / (2 if device.capability in _CONSUMER else 1)
    if dtype == torch.float32:
        rate /= 6  # three products at half of the rate
    # A wide tile feeds the tensor cores best; wgmma needs 64 rows, below them mma.sync runs at about half.
    efficiency = min(
        1.0, 0.55 + 0.15 * math.log2(min(config.block_m, 128) * min(config.block_n, 256) / 4096) / 3
    )
    if device.capability[0] == 9 and config.block_m < 64:
        efficiency /= 2
    stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    in_flight = config.programs_per_sm * (config.num_stages - 1) * stage
    bandwidth = min(_L2_BYTES, in_flight / _LATENCY)
    steps = math.ceil(inner / config.block_k)
    row_tiles, column_tiles = math.ceil(rows / config.block_m), math.ceil(columns / config.block_n)
    # Programs that share a processor share its tensor cores and its bandwidth.
    slots = device.multiprocessors * config.programs_per_sm
    waves = math.ceil(row_tiles * column_tiles / slots)
    busy = min(config.programs_per_sm, math.ceil(row_tiles * column_tiles / device.multiprocessors))
    arithmetic = busy * config.block_m * config.block_n * config.block_k * steps / (rate * efficiency)
    traffic = busy * stage * steps / bandwidth
    read = (rows + columns) * inner * dtype.itemsize
    memory = read / (_MEMORY_BYTES * device.multiprocessors)
    compute = waves * (max(arithmetic, traffic) + _TILE_OVERHEAD)
    # What is hidden behind the other is not quite free; this also decides between equals.
    return max(compute, memory) + 0.1 * min(compute, memory)


# --- what was measured --------------------------------------------------------------------------------------

# Sum of the base-2 logarithms by which rows, columns and inner columns may differ from a measured launch.
NEAR = 1.25


def tuned_file(capability: tuple[int, int]) -> Path:
    return Path(__file__).with_name(f"tuned_sm{capability[0]}{capability[1]}.json")


@lru_cache
def tuned_table(capability: tuple[int, int]) -> tuple[tuple, ...]:
    """(op, dtype name, rows, columns, inner, config) of every measured launch; empty where nothing was measured."""
    file = tuned_file(capability)
    if not file.exists():
        return ()
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    keys = ("op", "dtype", "rows", "columns", "inner")
    return tuple((*(entry[key] for key in keys), GemmConfig(**entry["config"])) for entry in entries)


def nearest_tuned(
    table: tuple[tuple, ...],
    device: DeviceClass,
    dtype: torch.dtype,
    op: str,
    rows: int,
    columns: int,
    inner: int,
) -> GemmConfig | None:
    """The winner of the nearest measured launch that fits the device, if one is near; float16 and bfloat16 are one."""
    best, best_distance = None, NEAR
    for entry_op, entry_dtype, *sizes, config in table:
        if entry_op != op or _precision(entry_dtype) != _precision(str(dtype)):
            continue
        pairs = zip(sizes, (rows, columns, inner), strict=True)
        distance = sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)
        if distance < best_distance and fits(config, device, dtype):
            best, best_distance = config, distance
    return best


def _precision(dtype: str) -> str:
    return "float32" if dtype.endswith("float32") else "half"


def tuned_entry(op: str, dtype: torch.dtype, rows: int, columns: int, inner: int, config: GemmConfig) -> dict:
    """One entry of a tuned file."""
    name = str(dtype).removeprefix("torch.")
    return {
        "op": op,
        "dtype": name,
        "rows": rows,
        "columns": columns,
        "inner": inner,
        "config": asdict(config),
    }
