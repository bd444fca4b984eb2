"""`norm_linear` and `rotate_add` for 1 to 16 rows: the CUDA kernels that read every weight once.

Arguments and results are those of `slicegpt.ops`; the tensors are validated, on one CUDA device, with unit column
strides. The launchers allocate with torch, run on the current stream, never synchronise and can be captured into a CUDA
graph; the same call gives the same bits. (The first call of a stream that needs to split synchronises once, for its
counters.)
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError
from slicegpt.ops import contracts
from slicegpt.ops.contracts import NormLinearInputs, activation_code, dtype_code, rotate_add_outputs
from slicegpt.ops.cuda import extension
from slicegpt.ops.cuda.extension import address
from slicegpt.ops.lasting import made_to_last

MAX_TOKENS = 16
DTYPES = contracts.DTYPES[:3]

# Rows of the weights that a warp multiplies, the M of mma.m16n8k16; and bytes of each that it reads at a time.
WARP_ROWS = 16
CHUNK_BYTES = 128
# One load of a lane.
PIECE_BYTES = 16
# Of L2, what a factor may take to be still there in `rotate_add`: the rest is for what was read around it.
L2_SHARE = 0.5
# Warps that a multiprocessor needs: each has 2 to 4 KB of weights in flight, so that 16 cover 4.8 TB/s times 0.7 µs.
WARPS_PER_PROCESSOR = 16
# Chunks that a warp has in flight, and those below which a split of K costs more (adding it up) than it saves.
CHUNKS_IN_FLIGHT = 2
MIN_SPLIT_CHUNKS = 4
MAX_SPLIT = 16


@dataclass(frozen=True)
class DecodeConfig:
    """Launch configuration of a product of few tokens with weights [N, K].

    Attributes:
        row_warps: warps of a block along N, 16 rows of the weights each: tile_n = 16 * row_warps.
        column_warps: warps of a block along K: those that share rows take every so-many-th chunk of their columns.
        split_k: blocks that share a tile, each with one range of K; the last to arrive adds up all of them.
    """

    row_warps: int
    column_warps: int
    split_k: int

    @property
    def tile_n(self) -> int:
        """Rows of the weights that a block multiplies."""
        return WARP_ROWS * self.row_warps

    def tiles(self, N: int, n_scaled: int = 0, gated: bool = False) -> int:
        """Blocks along N: with gates, 8 gate rows and the 8 that they gate for each 16."""
        if not gated:
            return -(-N // self.tile_n)
        return -(-n_scaled // self.tile_n) + -(-(N - n_scaled) // self.tile_n)


@dataclass(frozen=True)
class DecodeDevice:
    """What launches depend on.

    Attributes:
        multiprocessors, l2_bytes: of the device.
        overlap: programmatic dependent launch, from compute capability 9.0 on; SLICEGPT_PDL=0 turns it off.
    """

    multiprocessors: int
    l2_bytes: int
    overlap: bool


@lru_cache
def decode_device(device: torch.device) -> DecodeDevice:
    """The facts of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    overlap = properties.major >= 9 and os.environ.get("SLICEGPT_PDL", "1") != "0"
    return DecodeDevice(properties.multi_processor_count, properties.L2_cache_size, overlap)


@lru_cache
def norm_linear_config(multiprocessors: int, tokens: int, N: int, d: int, itemsize: int) -> DecodeConfig:
    """For weights [N, d] on a device with so many multiprocessors."""
    # The tokens' rows come from L2 once for each block: with 16 rows of weights a block they are tokens / 16 of the
    # weights' bytes. Wider tiles keep that at a quarter of what DRAM delivers.
    row_warps = 1 if tokens <= 4 else 2 if tokens <= 8 else 4
    return _config(multiprocessors, row_warps, N, -(-d * itemsize // CHUNK_BYTES))


def rotate_split(config: DecodeConfig) -> DecodeConfig:
    """`rotate_add`'s configuration with the split_k of SLICEGPT_ROTATE_SPLIT; as it is with auto.

    At 25 %, Llama-2-7B's launches have 96 blocks for 132 multiprocessors: whether a split, which all of them would work
    on, gains more than adding it up costs, a measurement will tell.
    """
    wish = os.environ.get("SLICEGPT_ROTATE_SPLIT", "auto")
    if wish == "auto":
        return config
    if not wish.isdecimal() or not 1 <= int(wish) <= MAX_SPLIT:
        raise SliceGPTError(f"SLICEGPT_ROTATE_SPLIT: must be auto or 1 to {MAX_SPLIT}, got {wish!r}")
    return replace(config, split_k=int(wish))


@lru_cache
def rotate_add_config(
    multiprocessors: int, tokens: int, N: int, K: int, d: int, itemsize: int
) -> DecodeConfig:
    """For weights [N, K] and a shortcut [N, d]; d = 0 where there is none."""
    # At least the 32 columns of one sum of squares.
    chunks = -(-K * itemsize // CHUNK_BYTES) + -(-d * itemsize // CHUNK_BYTES)
    return _config(multiprocessors, 2 if tokens <= 8 else 4, N, chunks)


def _config(multiprocessors: int, row_warps: int, N: int, chunks: int) -> DecodeConfig:
    tiles = -(-N // (WARP_ROWS * row_warps))
    needed = WARPS_PER_PROCESSOR * multiprocessors
    warps = 8 if tiles * 8 >= 2 * needed else 16
    column_warps = min(warps // row_warps, _power_of_two(max(1, chunks // CHUNKS_IN_FLIGHT)))
    # Adding up splits costs a round trip through L2: only where a quarter of the multiprocessors would have no work.
    have = tiles * row_warps * column_warps
    most = max(1, chunks // (MIN_SPLIT_CHUNKS * column_warps))
    split_k = 1 if have >= 0.7 * needed else min(-(-needed // have), most)
    return DecodeConfig(row_warps, column_warps, split_k)


def _power_of_two(value: int) -> int:
    """The largest one that is not above value."""
    return 1 << (value.bit_length() - 1)


def is_supported(capability: tuple[int, int], dtype: torch.dtype, tokens: int = 1) -> bool:
    """Whether the decode kernels take `tokens` rows of this dtype on this compute capability (any width)."""
    if capability < (7, 5) or dtype not in DTYPES or not 0 <= tokens <= MAX_TOKENS:
        return False
    # Turing's tensor cores know no bfloat16.
    return dtype is not torch.bfloat16 or capability >= (8, 0)


def norm_linear(inputs: NormLinearInputs) -> Tensor:
    """See `slicegpt.ops.norm_linear`."""
    extension.require("norm_linear")
    h, (N, d) = inputs.h, inputs.weight.shape
    _check_rows("norm_linear", h)
    y = inputs.output()
    if y.numel() == 0:
        return y
    config = norm_linear_config(decode_device(h.device).multiprocessors, h.shape[0], N, d, h.element_size())
    arguments = norm_linear_arguments(inputs, y)
    with extension.on_device(h):
        launch, _partial = _launch(config, config.tiles(N, inputs.n_scaled, inputs.gated), h)
        status = extension.call("decode_norm_linear", h, arguments, launch)
        extension.check_status("norm_linear", status)
    return y


def rotate_add(
    a: Tensor,
    weight: Tensor,
    h: Tensor,
    shortcut: Tensor | None = None,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `slicegpt.ops.rotate_add`; where `takes_factor`, the last columns of `weight` are not read."""
    extension.require("rotate_add")
    _check_rows("rotate_add", a)
    h_next, sumsq = rotate_add_outputs(a, weight)
    if h_next.numel() == 0:
        return h_next, sumsq
    if factor is not None and not takes_factor(weight, factor):
        factor = None
    columns = 0 if shortcut is None else h.shape[1]
    arguments = rotate_add_arguments(a, weight, h, shortcut, bias, factor, h_next, sumsq)
    (tokens, K), N = a.shape, weight.shape[0]
    K -= 0 if factor is None else factor.shape[0]
    config = rotate_split(
        rotate_add_config(decode_device(a.device).multiprocessors, tokens, N, K, columns, a.element_size())
    )
    with extension.on_device(a):
        launch, _partial = _launch(config, config.tiles(N), a)
        extension.check_status("rotate_add", extension.call("decode_rotate_add", a, arguments, launch))
    return h_next, sumsq


def takes_factor(weight: Tensor, factor: Tensor) -> bool:
    """Whether `rotate_add` reads a compact shortcut's F from `factor`; else from the last columns of `weight`.

    `factor` must have unit column stride, and be small enough that L2 still holds it after `norm_linear`. The columns
    of `weight` before F's must be whole 16-byte pieces: otherwise every row would be read item by item.
    """
    inner_bytes = (weight.shape[1] - factor.shape[0]) * weight.element_size()
    return (
        0 < factor.nbytes <= L2_SHARE * decode_device(factor.device).l2_bytes
        and factor.stride(1) == 1
        and inner_bytes % PIECE_BYTES == 0
    )


def norm_linear_arguments(inputs: NormLinearInputs, y: Tensor):
    """What the launchers in csrc/decode.h take."""
    h, weight, sumsq = inputs.h, inputs.weight, inputs.sumsq
    return extension.module.NormLinearArguments(
        h=h.data_ptr(),
        h_stride=h.stride(0),
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        bias=address(inputs.bias),
        sumsq=address(sumsq),
        parts=0 if sumsq is None else sumsq.shape[1],
        y=y.data_ptr(),
        y_stride=y.stride(0),
        dtype=dtype_code(h.dtype),
        tokens=h.shape[0],
        d=h.shape[1],
        N=weight.shape[0],
        n_scaled=inputs.n_scaled,
        activation=activation_code(inputs.activation),
        gated=inputs.gated,
        divisor=inputs.divisor,
        eps=inputs.eps,
    )


def rotate_add_arguments(a, weight, h, shortcut, bias, factor, h_next, sumsq):
    """What the launchers in csrc/decode.h take: with `factor`, z is what a's last columns hold."""
    rank = 0 if factor is None else factor.shape[0]
    inner = a.shape[1] - rank
    return extension.module.RotateAddArguments(
        a=a.data_ptr(),
        a_stride=a.stride(0),
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        h=h.data_ptr(),
        h_stride=h.stride(0),
        shortcut=address(shortcut),
        shortcut_stride=_stride(shortcut),
        bias=address(bias),
        z=a.data_ptr() + inner * a.element_size() if rank else 0,
        z_stride=a.stride(0) if rank else 0,
        factor=address(factor),
        factor_stride=_stride(factor),
        h_next=h_next.data_ptr(),
        h_next_stride=h_next.stride(0),
        sumsq=sumsq.data_ptr(),
        dtype=dtype_code(a.dtype),
        tokens=a.shape[0],
        K=inner,
        d=h.shape[1],
        N=h_next.shape[1],
        rank=rank,
    )


def _launch(config: DecodeConfig, tiles: int, like: Tensor):
    """The configuration as the launchers take it, and the memory for split_k > 1, to be kept until the launch."""
    partial, arrivals = None, 0
    if config.split_k > 1:
        items = config.split_k * tiles * like.shape[0] * config.tile_n
        partial = torch.empty(items, dtype=torch.float32, device=like.device)
        arrivals = _arrivals(like).take(tiles, like)
    launch = extension.module.DecodeLaunch(
        row_warps=config.row_warps,
        column_warps=config.column_warps,
        split_k=config.split_k,
        partial=address(partial),
        arrivals=arrivals,
        overlap=decode_device(like.device).overlap,
        stream=extension.current_stream(like),
    )
    return launch, partial


class Arrivals:
    """Zeros that the blocks of a launch count their arrivals in, and leave zero.

    Two launches that may run at the same time need different ones. Those on one stream follow each other and share;
    a captured launch keeps its own for good, because graphs captured on one stream may be replayed on several.

    They outlive every graph, so they must not lie in a graph's memory pool (see `made_to_last`).
    """

    POOL = 1 << 18

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Tensor | None = None
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
        self.lock = Lock()

    def take(self, count: int, like: Tensor) -> int:
        """The address of `count` of them, for a launch on the current stream."""
        with self.lock:
            return self._take(count, like)

    def _take(self, count: int, like: Tensor) -> int:
        if extension.capturing(like):
            if self.pool is None or self.used + count > self.POOL:
                # No zeros from before the capture: they become a node of the graph.
                self.kept.append(torch.zeros(count, dtype=torch.int32, device=self.device))
                return self.kept[-1].data_ptr()
            self.used += count
            return self.pool.data_ptr() + 4 * (self.used - count)
        if self.pool is None or self.used > self.POOL // 2:
            if self.pool is not None:
                self.kept.append(self.pool)
            self.pool, self.used = self._allocate(self.POOL), 0
        stream = extension.current_stream(like)
        if stream not in self.of_stream or self.of_stream[stream].numel() < count:
            self.kept += [self.of_stream[stream]] if stream in self.of_stream else []
            self.of_stream[stream] = self._allocate(max(count, 1024))
        return self.of_stream[stream].data_ptr()

    def _allocate(self, count: int) -> Tensor:
        return made_to_last(lambda: torch.zeros(count, dtype=torch.int32, device=self.device), self.device)


@lru_cache
def arrivals_of(device: torch.device) -> Arrivals:
    return Arrivals(device)


def _arrivals(like: Tensor) -> Arrivals:
    return arrivals_of(like.device)


def _check_rows(op: str, rows: Tensor) -> None:
    if rows.shape[0] > MAX_TOKENS:
        raise SliceGPTError(f"{op}: the decode kernels take at most {MAX_TOKENS} rows, got {rows.shape[0]}")
    if rows.dtype not in DTYPES:
        raise SliceGPTError(f"{op}: the decode kernels take float16, bfloat16 and float32, got {rows.dtype}")


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
