"""What every kernel should take on a device, from bytes, operations, machine code and occupancy: made before measuring.

A measured figure stands beside its prediction (`slicegpt.bench.commands.gpu_summary`), and a difference is a question:
about the kernel, or about this model. The device's rates are the ceilings that the same run has measured, so that
clocks and power limits are in both. None of these predictions has been compared with a GPU so far.

- A product of few tokens reads its weights: bytes over the copy rate, or over what the bytes in flight allow where that
  is less (Little's law), and what happens once a launch.
- Covariances multiply: tensor instructions over their rate; what the schedulers issue besides them is hidden only where
  it is interleaved with them, which the machine code shows.
- A product of many tokens takes what `slicegpt.kernels.gemm_config` expects, the model that chooses its configuration,
  and no less than the library's rate and its bytes allow. Before sm_80 it is the library's, and an epilogue after it.
- Attention of one token reads keys and values, as fast as the bytes that its programs have in flight allow.

`slicegpt.bench.models.network_times` puts them together: layers, tokens, throughput.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slicegpt.bench.models.devices import DevicePeaks
from slicegpt.bench.models.processors import Processor, processor_of
from slicegpt.bench.models.shapes import Launch, NormLinearShape, RotateAddShape
from slicegpt.kernels import attention_config, gemm_config
from slicegpt.ops.cuda.decode import (
    CHUNK_BYTES,
    MAX_TOKENS,
    DecodeConfig,
    norm_linear_config,
    rotate_add_config,
)
from slicegpt.ops.gram import EXPECTED_PLANES

HOPPER = processor_of((9, 0))


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel for sm_90a (nvcc 13.0, triton 3.9, bfloat16; the tests of compilation compare).

    The kernels for few rows have as many registers on sm_75 and sm_80.

    Attributes:
        registers: of a thread.
        threads: of a block.
        shared_bytes: of a block.
        tensor, conversions: instructions of a warp in one turn of the main loop.
        longest_gap: instructions between two tensor instructions, the loads of the next stage aside.
        loop: instructions of a warp in one turn of the main loop, where they bound it.
    """

    registers: int
    threads: int
    shared_bytes: int = 0
    tensor: int = 0
    conversions: int = 0
    longest_gap: int = 0
    loop: int = 0

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor of Hopper holds at a time."""
        return self.blocks_on(HOPPER)

    def blocks_on(self, processor: Processor) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = self.threads // 32
        by_registers = processor.registers // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = processor.shared_bytes // max(1, self.shared_bytes + processor.block_reserve)
        return min(by_registers, by_shared, processor.warps // warps)


# By kernel. Before the branch on weights left the step, gram_fp64's gaps were 98 and 92 instructions long.
CODE = {
    "gram_fp64": MachineCode(250, 256, 3 * 18_688, tensor=64, conversions=89, longest_gap=9),
    "gram_exact": MachineCode(254, 256, 4 * 24_576, tensor=64),
    "gram_exact, wgmma": MachineCode(168, 288, 230_016, tensor=2),
    "norm_linear": MachineCode(64, 512, 14_336),
    "rotate_add": MachineCode(64, 512, 24_576),
    # A query head a program, of 4 warps and of 16; a group of them, on tensor cores.
    "decode_attention": MachineCode(107, 128, 1024, loop=433),
    "decode_attention, 16 warps": MachineCode(118, 512, 4096, loop=485),
    "decode_attention, group": MachineCode(136, 128, 38_912, loop=435),
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
SCANNED_A_CYCLE, RESIDUES_A_CYCLE = 3, 7
# Of the data sheet's rates, what is taken to be reached where nothing has been measured: copies, as on all of these
# devices; products, what the best published int8 emulation of float64 reaches on Hopper.
COPY_SHARE, PRODUCT_SHARE = 0.9, 0.83


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device: bytes/s, and operations/s of int8, bfloat16 (float16 before sm_80) and float64; cycles/s."""

    copy: float
    int8: float
    bfloat16: float
    float64: float
    multiprocessors: int
    clock: float
    capability: tuple[int, int]

    @property
    def processor(self) -> Processor:
        return processor_of(self.capability)

    @property
    def overlaps(self) -> bool:
        """Whether a kernel can start before the one ahead has ended: programmatic dependent launch."""
        return self.capability >= (9, 0)

    @classmethod
    def on_paper(cls, device: DevicePeaks) -> "Ceilings":
        """What is taken to be reached of a data sheet's rates."""
        rates = (PRODUCT_SHARE * 1e12 * rate for rate in (device.int8, device.half, device.fp64))
        return cls(COPY_SHARE * device.bandwidth * 1e9, *rates, *_facts(device))

    @classmethod
    def of(cls, measured: Mapping[str, float], device: DevicePeaks) -> "Ceilings | None":
        """From the figures beside a result; None where one is missing."""
        names = ("copy, GB/s", "int8 product, TOP/s", "bfloat16 product, TFLOP/s", "float64 product, TFLOP/s")
        if not all(measured.get(name) for name in names):
            return None
        copy, int8, bfloat16, float64 = (measured[name] for name in names)
        return cls(copy * 1e9, int8 * 1e12, bfloat16 * 1e12, float64 * 1e12, *_facts(device))


def _facts(device: DevicePeaks) -> tuple[int, float, tuple[int, int]]:
    """Multiprocessors, the clock of the data sheet's rates, and the compute capability."""
    processor, count = processor_of(device.capability), device.multiprocessors
    return count, device.half * 1e12 / (2 * processor.half_products * count), device.capability


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
    overlap = overlap and device.overlaps
    config = decode_config(launch, rows, device)
    code = CODE["norm_linear" if isinstance(launch, NormLinearShape) else "rotate_add"]
    warps = config.row_warps * config.column_warps
    blocks = config.tiles(launch.columns) * config.split_k
    held = min(
        blocks,
        device.multiprocessors * max(1, code.blocks_on(device.processor) * code.threads // (32 * warps)),
    )
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


# --- many tokens ----------------------------------------------------------------------------------------------------


def product_seconds(
    launch: Launch, rows: int, device: Ceilings, overlap: bool = True, dtype: torch.dtype = torch.bfloat16
) -> float:
    """`norm_linear` or `rotate_add` of any number of rows of 16-bit numbers, by the kernel that is taken for them."""
    if rows <= MAX_TOKENS:
        return decode_seconds(launch, rows, device, overlap)
    reads = isinstance(launch, NormLinearShape)
    inner = launch.inner if reads else launch.total_inner
    operations = 2 * rows * launch.columns * inner / device.bfloat16
    stored = rows * (launch.output_columns if reads else launch.columns) * dtype.itemsize
    moved = (rows + launch.columns) * inner * dtype.itemsize + stored
    # norm_linear's row scales are a launch of their own, or their sums are (rotate_add writes them).
    gaps = LAUNCH * (2 if reads else 1)
    if device.capability < (8, 0):
        product = 4 * rows * launch.columns
        products = 2 if not reads and launch.dense else 1
        # Written in float32 by the library, read by the epilogue.
        return operations + (moved + 2 * products * product) / device.copy + gaps + LAUNCH * products
    facts = gemm_config.DeviceClass(
        device.capability, device.multiprocessors, device.processor.block_shared_bytes
    )
    if reads:
        gated = launch.activation.endswith("_gated")
        config = gemm_config.norm_linear_config(facts, dtype, rows, launch.columns, inner, gated)
    else:
        config = gemm_config.rotate_add_config(facts, dtype, rows, launch.columns, inner, launch.dense)
    cycles = gemm_config.predicted_cycles(config, facts, dtype, rows, launch.columns, inner)
    return max(cycles / device.clock, operations, moved / device.copy) + gaps


# --- attention of one token -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Of one layer's attention, and the bytes of a number in its cache."""

    queries: int
    keys: int
    size: int
    itemsize: int = 2


def cache_bytes(heads: Heads, batch: int, context: int) -> int:
    """Keys and values of `context` tokens of each of `batch` sequences."""
    return 2 * batch * heads.keys * context * heads.size * heads.itemsize


def attention_seconds(
    heads: Heads, batch: int, context: int, capacity: int, device: Ceilings, overlap: bool = True
) -> float:
    """`decode_attention_` of a layer, in a chain of launches.

    context: tokens in the cache, of `capacity` that there is room for, which decides how many splits there are.
    """
    gap = OVERLAPPED_LAUNCH if overlap and device.overlaps else LAUNCH
    group = heads.queries // heads.keys
    dtype = torch.float16 if heads.itemsize == 2 else torch.float32
    dot = attention_config.uses_tensor_cores(group, dtype, device.capability)
    programs = batch * (heads.keys if dot else heads.queries)
    splits = attention_config.splits_for(capacity, programs, device.multiprocessors)
    warps = attention_config.warps_for(programs * splits, device.multiprocessors, dot)
    once = ATTENTION + gap + (gap + ARRIVALS if splits > 1 else 0.0)
    if context == 0:
        return once
    width = max(16, 1 << (heads.size - 1).bit_length())
    block = attention_config.block_tokens(width, heads.itemsize, dot, warps)
    code = CODE["decode_attention" + (", group" if dot else ", 16 warps" if warps == 16 else "")]
    held = min(programs * splits, device.multiprocessors * code.blocks_on(device.processor))
    # A turn of the loop waits for its own keys and values. What query heads of a group read again comes from L2.
    in_flight = held * 2 * min(block, -(-context // splits)) * heads.size * heads.itemsize
    loaded = cache_bytes(heads, batch, context) * (1 if dot else group)
    turns = programs * splits * -(-context // (block * splits))
    issue = turns * code.loop * warps / (device.processor.schedulers * device.multiprocessors * device.clock)
    reading = max(cache_bytes(heads, batch, context) / device.copy, loaded * LATENCY / in_flight, issue)
    return once + reading


# --- covariances ----------------------------------------------------------------------------------------------------


def float64_seconds(tokens: int, columns: int, device: Ceilings, interleaved: bool = True) -> float:
    """`gram_` fp64: the triangle's products at the library's float64 rate, and conversions where nothing hides them.

    A block converts its 128 + 128 columns for every warp that multiplies them: 4 warps of 64 rows and 32 columns share
    a row, 2 a column, so that a token takes 4 * 128 + 2 * 128 conversions for 128 * 128 products.
    """
    operations = tokens * columns * (columns + 128)  # half a tile more along the diagonal
    products = 128 * 128 / device.processor.double_products
    conversions = (4 * 128 + 2 * 128) / device.processor.double_conversions
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
    rate = device.int8 * (MMA_SYNC if kernel == "mma" and device.capability[0] == 9 else 1.0)
    items, cycles = tokens * columns, device.multiprocessors * device.clock
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
