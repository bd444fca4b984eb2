"""What every kernel should take on a device, from bytes, operations, machine code and occupancy: made before measuring.

A measured figure stands beside its prediction (`slicegpt.bench.commands.gpu_summary`), and a difference is a question:
about the kernel, or about this model. The device's rates are the ceilings that the same run has measured, so that
clocks and power limits are in both. None of these predictions has been compared with a GPU so far.

- A product of few tokens reads its weights: bytes over the copy rate, or over what the bytes in flight allow where that
  is less (Little's law), and what happens once a launch.
- Covariances multiply: tensor instructions over their rate; what the schedulers issue besides them is hidden only where
  it is interleaved with them, which the machine code shows.
- A product of many tokens takes what `slicegpt.kernels.gemm_config` expects, the model that chooses its configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slicegpt.bench.models.shapes import Launch, NormLinearShape, RotateAddShape
from slicegpt.ops.cuda.decode import (
    CHUNK_BYTES,
    DecodeConfig,
    norm_linear_config,
    rotate_add_config,
)
from slicegpt.ops.gram import EXPECTED_PLANES

REGISTERS, SHARED_BYTES, WARPS = 65536, 227 * 1024, 64  # of a Hopper multiprocessor
BLOCK_RESERVE = 1024  # shared memory that the system takes of every block


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel for sm_90a (nvcc 13.0, bfloat16; tests/csrc/test_compile.py compares).

    Attributes:
        registers: of a thread.
        threads: of a block.
        shared_bytes: of a block.
        tensor, conversions: instructions of a warp in one turn of the main loop.
        longest_gap: instructions between two tensor instructions, the loads of the next stage aside.
    """

    registers: int
    threads: int
    shared_bytes: int = 0
    tensor: int = 0
    conversions: int = 0
    longest_gap: int = 0

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = self.threads // 32
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = SHARED_BYTES // (self.shared_bytes + BLOCK_RESERVE)
        return min(by_registers, by_shared, WARPS // warps)


# By kernel. Before the branch on weights left the step, gram_fp64's gaps were 98 and 92 instructions long.
CODE = {
    "gram_fp64": MachineCode(250, 256, 3 * 18_688, tensor=64, conversions=89, longest_gap=9),
    "gram_exact": MachineCode(254, 256, 4 * 24_576, tensor=64),
    "gram_exact, wgmma": MachineCode(168, 288, 230_016, tensor=2),
    "norm_linear": MachineCode(64, 512, 14_336),
    "rotate_add": MachineCode(64, 512, 24_576),
}

# A lane keeps two chunks of 64 bytes in flight, and one while it waits for the older: 1.5 on average.
BYTES_IN_FLIGHT = 32 * 1.5 * 64
LATENCY = 0.7e-6  # seconds from a load to its value, DRAM under load
LAUNCH, OVERLAPPED_LAUNCH = 2.0e-6, 0.7e-6  # from a kernel's end to the next one's first byte
ARRIVALS = 1.5e-6  # adding up splits: a round trip through L2
FACTOR_STEP = 0.9e-6  # two rows of loads of the factor from L2, and their products
ATTENTION = 2.5e-6  # of a short cache: norms, rotation, softmax
# Of wgmma's int8 rate, which mma.sync reaches on Hopper.
MMA_SYNC = 0.63
# What the passes before the products do in a cycle of a multiprocessor: items scanned, some 30 instructions each, and
# residues written, some 13 each (SASS of csrc/residues.cu), with 70 % of the 128 lanes busy. They are bound by that.
SCANNED_A_CYCLE, RESIDUES_A_CYCLE, CLOCK = 3, 7, 1.75e9
# Conversions to float64 that a multiprocessor does in a cycle, and products of DMMA.
CONVERSIONS_A_CYCLE, FMA_A_CYCLE = 16, 128


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device: bytes/s, and operations/s of int8, bfloat16 and float64."""

    copy: float
    int8: float
    bfloat16: float
    float64: float
    multiprocessors: int = 132

    @classmethod
    def of(cls, measured: Mapping[str, float]) -> "Ceilings | None":
        """From the figures beside a result; None where one is missing."""
        names = ("copy, GB/s", "int8 product, TOP/s", "bfloat16 product, TFLOP/s", "float64 product, TFLOP/s")
        if not all(measured.get(name) for name in names):
            return None
        copy, int8, bfloat16, float64 = (measured[name] for name in names)
        return cls(copy * 1e9, int8 * 1e12, bfloat16 * 1e12, float64 * 1e12)


# --- one token ------------------------------------------------------------------------------------------------------


def decode_config(launch: Launch, rows: int, device: Ceilings, itemsize: int = 2) -> DecodeConfig:
    """The configuration that the launcher chooses."""
    if isinstance(launch, NormLinearShape):
        return norm_linear_config(device.multiprocessors, rows, launch.columns, launch.inner, itemsize)
    columns = launch.width if launch.dense else 0
    inner = launch.inner - launch.z_columns
    return rotate_add_config(device.multiprocessors, rows, launch.columns, inner, columns, itemsize)


def weight_bytes(launch: Launch, itemsize: int = 2) -> int:
    """What DRAM delivers: a compact shortcut's factor was read by the launch before, and comes from L2."""
    if isinstance(launch, NormLinearShape):
        return launch.columns * launch.inner * itemsize
    return launch.columns * (launch.total_inner - (0 if launch.dense else launch.z_columns)) * itemsize


def decode_seconds(launch: Launch, rows: int, device: Ceilings, overlap: bool = True) -> float:
    """`norm_linear` or `rotate_add` of 1 to 16 rows in a chain of such launches."""
    config = decode_config(launch, rows, device)
    code = CODE["norm_linear" if isinstance(launch, NormLinearShape) else "rotate_add"]
    warps = config.row_warps * config.column_warps
    blocks = config.tiles(launch.columns) * config.split_k
    held = min(blocks, device.multiprocessors * max(1, code.blocks * code.threads // (32 * warps)))
    in_flight = held * warps * BYTES_IN_FLIGHT
    rate = min(device.copy, in_flight / LATENCY)
    seconds = weight_bytes(launch) / rate + (OVERLAPPED_LAUNCH if overlap else LAUNCH)
    if config.split_k > 1:
        seconds += ARRIVALS
    if isinstance(launch, RotateAddShape) and launch.z_columns and not launch.dense:
        # Steps of 16 rows of the factor, two at a time, beside what the prefetches bring into L2 meanwhile.
        steps = -(-launch.z_columns // (16 * warps * config.split_k * 2))
        fetched = blocks * 4 * config.column_warps * CHUNK_BYTES * config.tile_n
        seconds += max(0.0, steps * FACTOR_STEP - min(fetched, weight_bytes(launch)) / device.copy)
    return seconds


def token_seconds(
    launches: tuple[Launch, ...],
    layers: int,
    head_bytes: float,
    cache_bytes: float,
    device: Ceilings,
    overlap: bool = True,
) -> float:
    """A token at batch 1: every layer's launches and its attention, and the head.

    head_bytes: of the head's weight. cache_bytes: keys and values that all layers read.
    """
    gap = OVERLAPPED_LAUNCH if overlap else LAUNCH
    layer = sum(decode_seconds(launch, 1, device, overlap) for launch in launches) + ATTENTION + gap
    return layers * layer + (head_bytes + cache_bytes) / device.copy + LAUNCH


# --- covariances ----------------------------------------------------------------------------------------------------


def float64_seconds(tokens: int, columns: int, device: Ceilings, interleaved: bool = True) -> float:
    """`gram_` fp64: the triangle's products at the library's float64 rate, and conversions where nothing hides them.

    A block converts its 128 + 128 columns for every warp that multiplies them: 4 warps of 64 rows and 32 columns share
    a row, 2 a column, so that a token takes 4 * 128 + 2 * 128 conversions for 128 * 128 products.
    """
    operations = tokens * columns * (columns + 128)  # half a tile more along the diagonal
    products = 128 * 128 / FMA_A_CYCLE
    conversions = (4 * 128 + 2 * 128) / CONVERSIONS_A_CYCLE
    share = max(products, conversions) if interleaved else products + conversions
    return operations / device.float64 * share / products


def exact_seconds(
    tokens: int, columns: int, dtype: torch.dtype, device: Ceilings, kernel: str, planes: float | None = None
) -> float:
    """`gram_` exact: the passes that make the planes, and a triangular int8 product a plane. kernel: mma or wgmma.

    planes: None for those of normal values.
    """
    count = EXPECTED_PLANES["cuda"][dtype] if planes is None else planes
    operations = count * tokens * columns * (columns + 256)
    # cuBLAS's own rate stands for what wgmma reaches.
    rate = device.int8 * (MMA_SYNC if kernel == "mma" else 1.0)
    items, cycles = tokens * columns, device.multiprocessors * CLOCK
    scan = max(items * dtype.itemsize / device.copy, items / SCANNED_A_CYCLE / cycles)
    planes_pass = max(
        items * (dtype.itemsize + count) / device.copy, items * count / RESIDUES_A_CYCLE / cycles
    )
    return operations / rate + scan + planes_pass


def gram_seconds(
    tokens: int, columns: int, dtype: torch.dtype, method: str, device: Ceilings
) -> float | None:
    """The prediction for a row of bench_gram; None for a method without one."""
    if method == "gram_ fp64":
        return float64_seconds(tokens, columns, device)
    if method.startswith("gram_ exact") and dtype in EXPECTED_PLANES["cuda"]:
        kernel = "wgmma" if "wgmma" in method else "mma"
        return exact_seconds(tokens, columns, dtype, device, kernel)
    if method == "gram_ fast" and dtype.itemsize == 2:
        return tokens * columns * (columns + 128) / device.bfloat16
    return None
