"""Ahead-of-time compilation of the fused GEMMs, without a GPU: what the configurations of real shapes become."""

import os
import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
from support.cubins import assert_no_spills, disassemble, registers  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slicegpt.kernels import norm_linear, rotate_add  # noqa: E402
from slicegpt.kernels.gemm_config import (  # noqa: E402
    DeviceClass,
    GemmConfig,
    candidates,
    norm_linear_config,
    rotate_add_config,
    shared_bytes,
)

DEVICES = {80: DeviceClass((8, 0), 108, 166_912), 90: DeviceClass((9, 0), 132, 232_448)}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
REGISTERS = 65536  # of a multiprocessor

# Llama-2-7B with 25 % of its columns sliced: weights [13312, 3072], [23040, 3072] and [3072, 12032]; [3072, 11008] with
# a dense shortcut [3072, 3072].
OPS = ("norm_linear", "norm_linear_gated", "rotate_add", "rotate_add_dense")


def config_for(op: str, capability: int, dtype: str, rows: int) -> GemmConfig:
    device, dtype = DEVICES[capability], TORCH[dtype]
    if op.startswith("norm_linear"):
        gated = op.endswith("gated")
        return norm_linear_config(device, dtype, rows, 23040 if gated else 13312, 3072, gated)
    dense = op.endswith("dense")
    return rotate_add_config(device, dtype, rows, 3072, 11008 + 3072 if dense else 12032, dense)


def build(
    op: str,
    capability: int,
    dtype: str,
    config: GemmConfig,
    sums: bool = False,
    activation: str | None = None,
    has_z: bool = True,
):
    """The compiled kernel; sizes and strides are multiples of 16, as those of real models are.

    sums: the tiles add up the sums of squares themselves. Gated MLPs have no biases. activation: where not given
    gelu_tanh, silu of a gated launch.
    """
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k

    def operand(*block):
        return f"tensordesc<{dtype}[{', '.join(map(str, block))}]>" if config.tma else f"*{dtype}"

    gated = op.endswith("gated")
    constants = {
        "TMA": config.tma, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    types = {"bias": f"*{dtype}", "out": f"*{dtype}"}
    if op.startswith("norm_linear"):
        kernel = norm_linear._norm_linear
        weight = operand(2, block_n // 2, block_k) if gated and config.tma else operand(block_n, block_k)
        types |= {"h": operand(block_m, block_k), "weight": weight, "z_weight": weight, "sums": "*fp32"}
        types |= {"divisor": "fp32", "eps": "fp32"}
        constants |= {"GATED": gated, "HAS_Z": has_z, "CHUNKS": 3 if sums else 0}
        constants["ACTIVATION"] = activation or ("silu" if gated else "gelu_tanh")
        absent = {"bias"} if gated else set()
        absent |= set() if gated and config.tma and has_z else {"z_weight"}
    else:
        kernel = rotate_add._rotate_add
        sources = {"a": block_m, "weight": block_n, "stream": block_m, "shortcut": block_n}
        types |= {name: operand(rows, block_k) for name, rows in sources.items()}
        types |= {"residual": f"*{dtype}", "sumsq": "*fp32"}
        absent = {"residual"} if op.endswith("dense") else {"stream", "shortcut"}
    constants |= dict.fromkeys(absent)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in ("rows", "parts")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(
    op: str, capability: int, dtype: str, config: GemmConfig, may_spill: bool = False, **options
) -> None:
    compiled = build(op, capability, dtype, config, **options)
    sass, resources = disassemble(compiled.asm["cubin"])
    if may_spill:
        # The assembler may keep a number or two of the tile loop in local memory, but nothing amid the products.
        assert int(re.search(r"STACK:(\d+)", resources)[1]) <= 16, resources
        assert not re.search(r"\bH?G?MMA\b.*\b(LDL|STL)\b.*\bH?G?MMA\b", sass, re.DOTALL)
    else:
        assert_no_spills(sass, resources)
    wgmma = capability == 90 and config.block_m >= 64
    assert ("HGMMA" if wgmma else "HMMA") in sass
    if wgmma and dtype != "fp32":
        # One group of products a step. More would mean that the assembler makes them wait for each other.
        assert len(re.findall(r"WARPGROUP\.ARRIVE", sass)) == 1
    assert ("UTMALDG" in sass) == config.tma
    assert ("LDGSTS" in sass) == (not config.tma)
    if not config.tma:
        assert not re.search(r"LDGSTS\.E(?!\S*\.128)", sass), "operands must be copied 16 bytes at a time"
    threads = 32 * config.num_warps * config.programs_per_sm
    assert -(-registers(resources) // 8) * 8 * threads <= REGISTERS
    assert compiled.metadata.shared <= shared_bytes(config, DEVICES[capability], TORCH[dtype])


LARGE = [
    *((op, 90, "bf16") for op in OPS),
    *((op, 80, "bf16") for op in OPS),
    ("norm_linear_gated", 90, "fp16"), ("rotate_add_dense", 80, "fp16"),
    ("norm_linear", 90, "fp32"), ("rotate_add_dense", 90, "fp32"), ("rotate_add", 80, "fp32"),
    ("norm_linear", 80, "fp16"), ("norm_linear_gated", 80, "fp32"), ("rotate_add", 90, "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "capability", "dtype"), LARGE)
def test_prefill(op, capability, dtype):
    check(op, capability, dtype, config_for(op, capability, dtype, rows=8192))


# With what `test_prefill` compiles (gelu_tanh and gated silu with z columns) every activation, with z or without.
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("activation", "has_z"),
    [
        ("none", True),
        ("relu", False),
        ("gelu", True),
        ("silu", False),
        ("relu2", True),
        ("gelu_gated", True),
        ("gelu_tanh_gated", False),
        ("silu_gated", False),
    ],
)
def test_activations(activation, has_z, capability):
    op = "norm_linear_gated" if activation.endswith("_gated") else "norm_linear"
    config = config_for(op, capability, "bf16", rows=8192)
    check(op, capability, "bf16", config, activation=activation.removesuffix("_gated"), has_z=has_z)


@pytest.mark.parametrize(
    ("op", "capability"), [("norm_linear", 90), ("rotate_add_dense", 90), ("rotate_add", 80)]
)
def test_few_rows(op, capability):
    check(op, capability, "bf16", config_for(op, capability, "bf16", rows=32), sums=op == "norm_linear")


@pytest.mark.parametrize("op", ["norm_linear_gated", "rotate_add_dense"])
def test_hopper_without_tma(op):
    """Operands that TMA cannot read are copied by the threads."""
    check(op, 90, "bf16", replace(config_for(op, 90, "bf16", rows=8192), tma=False))


@pytest.mark.slow
@pytest.mark.skipif(
    "SLICEGPT_TEST_CANDIDATES" not in os.environ, reason="minutes: set SLICEGPT_TEST_CANDIDATES=1"
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_every_candidate(op, capability, dtype):
    """What tuning may choose."""
    for config in candidates(DEVICES[capability], TORCH[dtype]):
        check(op, capability, dtype, config, may_spill=True)
