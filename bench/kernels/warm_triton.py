"""Compiles the Triton kernels that a model's runtime will launch, into Triton's cache, with many processes at once.

    python -m slicegpt.bench.kernels.warm_triton --shape llama-2-7b --slice 0,0.25 --processes 16
    TRITON_CACHE_DIR=build/triton python -m slicegpt.bench.kernels.warm_triton --target 90

The launchers run as they always do, on tensors without memory, but compile instead of launching: what enters the cache
is what they will look for. With `--target` no GPU is needed. Whether another machine takes such a cache: Triton's key
holds its own sources, its shared library (which differs from one Python version to the next), ptxas's version, the
kernel's source and line, and the signature. The digest that is printed has the first three; where it is the same
there, the files are found.
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version

from slicegpt.bench.models.architectures import sliced_config
from slicegpt.bench.models.devices import DEVICES
from slicegpt.bench.models.network_times import heads_of, shortcut_of
from slicegpt.bench.models.processors import processor_of
from slicegpt.bench.models.shapes import NormLinearShape, launches
from slicegpt.kernels import decode_attention, norm_linear, rotate_add
from slicegpt.kernels.gemm_config import DeviceClass
from slicegpt.ops.contracts import DecodeAttentionInputs, NormLinearInputs

# Rows of prompts and batches, and what the caches of a decoding step have room for.
ROWS = (32, 64, 128, 256, 512, 1024, 2048, 8192)
CAPACITIES = (192, 4096)
BATCHES = (1, 16)


class TargetDriver:
    """Stands for Triton's driver where there is no GPU: something to compile for, nothing to launch on."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def key_digest(capability: int) -> str:
    """Of what Triton's key holds besides the launch."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # until 3.5
        from triton.compiler.compiler import triton_key
    return hashlib.sha256(f"{triton_key()} {get_ptxas_version(capability)}".encode()).hexdigest()[:16]


def facts_of(capability: int) -> DeviceClass:
    """What configurations depend on, of the first device of this compute capability that is known."""
    pair = divmod(capability, 10)
    device = next(one for one in DEVICES if one.capability == pair)
    return DeviceClass(pair, device.multiprocessors, processor_of(pair).block_shared_bytes)


def calls(shape: str, fractions: list[float], facts: DeviceClass) -> Iterator[tuple[str, Callable]]:
    """(name, call of a launcher) of a layer's products for many rows, and of its attention while decoding."""
    dtype = torch.bfloat16

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for fraction in fractions:
        for one in launches(shape, fraction, shortcut_of(fraction)):
            for rows in ROWS:
                if isinstance(one, NormLinearShape):
                    bias = empty(one.n_scaled) if one.bias else None
                    inputs = NormLinearInputs(
                        empty(rows, one.inner), empty(one.columns, one.inner), bias,
                        empty(rows, -(-one.inner // 32), dtype=torch.float32), one.n_scaled, one.activation,
                        float(one.inner), 1e-5,
                    )  # fmt: skip
                    call = lambda inputs=inputs: norm_linear.norm_linear(inputs)  # noqa: E731
                else:
                    operands = (
                        empty(rows, one.inner), empty(one.columns, one.inner), empty(rows, one.width),
                        empty(one.columns, one.width) if one.dense else None,
                        empty(one.columns) if one.bias else None,
                    )  # fmt: skip
                    call = lambda operands=operands: rotate_add.rotate_add(*operands)  # noqa: E731
                yield f"{one.part}, {100 * fraction:g} %, {rows} rows", call
    heads = heads_of(sliced_config(shape, 0.0))
    overlap = facts.capability >= (9, 0)
    for batch in BATCHES:
        for capacity in CAPACITIES:
            cache = [empty(batch, heads.keys, capacity, heads.size) for _ in range(2)]
            angles = [empty(batch, 1, heads.size) for _ in range(2)]
            inputs = DecodeAttentionInputs(
                empty(batch, (2 * heads.keys + heads.queries) * heads.size), *cache,
                empty(batch, capacity, dtype=torch.bool), empty(1, dtype=torch.long), *angles, None,
                heads.queries, None, 0.0, False,
            )  # fmt: skip
            yield (
                f"attention, batch {batch}, capacity {capacity}",
                lambda inputs=inputs: decode_attention.decode_attention_(inputs, overlap=overlap),
            )


@contextlib.contextmanager
def compiling_only(facts: DeviceClass, driver: object | None) -> Iterator[None]:
    """Launches compile, and do nothing else; driver: None for Triton's own."""

    def compile_only(kernel, grid):
        return lambda *arguments, **options: kernel.run(*arguments, grid=grid, warmup=True, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "__getitem__", compile_only))
        for module in (norm_linear, rotate_add, decode_attention):
            stack.enter_context(mock.patch.object(module, "device_class", return_value=facts))
        if driver is not None:
            triton.runtime.driver.set_active(driver)  # for this process
        yield


def warm(
    shape: str, fractions: list[float], capability: int, driver: object | None, share: slice, only: str = ""
) -> int:
    """Compile a share of the launches whose name contains `only`; how many there were."""
    facts = facts_of(capability)
    mine = [one for one in calls(shape, fractions, facts) if only in one[0]][share]
    with compiling_only(facts, driver):
        for name, call in mine:
            begin = time.perf_counter()
            call()
            print(f"{time.perf_counter() - begin:6.1f} s  {name}", flush=True)
    return len(mine)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--slice", default="0,0.25,0.5", help="fractions of the columns deleted")
    parser.add_argument(
        "--target", type=int, choices=(80, 90), help="compile for it; default: this machine's GPU"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--part", type=int, help="of the processes' shares, that of this one (default: starts all)"
    )
    parser.add_argument("--only", default="", help="launches whose name has this part")
    options = parser.parse_args()
    capability = options.target
    if capability is None:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    if options.part is None:
        print(f"triton {triton.__version__}, key {key_digest(capability)}", flush=True)
        command = [sys.executable, "-m", "slicegpt.bench.kernels.warm_triton", *sys.argv[1:]]
        parts = [subprocess.Popen([*command, "--part", str(part)]) for part in range(options.processes)]
        sys.exit(max([abs(part.wait()) for part in parts]))
    driver = None if options.target is None else TargetDriver(capability)
    fractions = [float(one) for one in options.slice.split(",")]
    warm(
        options.shape,
        fractions,
        capability,
        driver,
        slice(options.part, None, options.processes),
        options.only,
    )


if __name__ == "__main__":
    main()
