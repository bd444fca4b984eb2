"""Ahead-of-time compilation of the Triton kernels, without a GPU: tensor-core instructions, and no spills."""

from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")
from support.cubins import assert_no_spills, disassemble, registers  # noqa: E402
from support.sass import longest_loop, overlap_faults  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slicegpt.bench.models.kernel_times import CODE  # noqa: E402
from slicegpt.kernels import cross_gram, decode_attention, gram_exact, gram_fp64  # noqa: E402
from slicegpt.kernels.attention_config import block_tokens  # noqa: E402

PRODUCT = {
    "X": "fp16", "weight": "fp64", "out": "fp64", "skip": "i32",
    "FAST": False, "ONTO_C": True, "BLOCK": 64, "BLOCK_K": 16, "SKIP_BLOCK": 128,
}  # fmt: skip
CROSS_PRODUCT = {
    "A": "fp16", "B": "fp16", "weight": "fp64", "partials": "fp64",
    "FAST": False, "BLOCK": 64, "BLOCK_K": 16,
}  # fmt: skip
MULTIPLY = {
    "residues": "i8", "tile_planes": "i32", "moduli": "i64", "products": "i8", "BLOCK": 128, "BLOCK_K": 128,
}  # fmt: skip
RESIDUES = {
    "X": "fp16", "weight": "fp64", "exponents": "i32", "tile_planes": "i32", "moduli": "i64", "powers": "i32",
    "residues": "i8", "PLANES": 16, "BLOCK": 128, "SIDE": 32, "BLOCK_T": 128, "BLOCK_C": 32,
}  # fmt: skip
RECONSTRUCT = {
    "products": "i8", "exponents": "i32", "tile_planes": "i32", "weights": "i64", "fractions": "fp32", "C":
    "fp64", "PLANES": 16, "BLOCK": 128, "ROWS": 16,
}  # fmt: skip


SPAN = {"X": "fp16", "weight": "fp64", "exponents": "i32", "BLOCK_T": 128, "BLOCK_C": 32}
FINISH = {"C": "fp64", "partials": "fp64", "BLOCK": 32}
# Of Llama-2-7B, and with a group, a norm and partial rotary positions.
ATTEND = {
    "rows": "fp16", "keys": "fp16", "values": "fp16", "valid": "i1", "slot": "i64", "cos": "fp16", "sin": "fp16",
    "norm": None, "sums": None, "peaks": None, "GROUP": 1, "KEY_HEADS": 32, "HEAD_DIM": 128, "ROTARY": 128,
    "ROTATE_FIRST": False,
    "WINDOW": None, "SPLITS": 1, "DOT": False, "BLOCK_G": 1, "BLOCK_N": 32, "WIDTH": 128, "OVERLAP": False,
}  # fmt: skip
GROUPED = {"norm": "fp16", "sums": "fp32", "peaks": "fp32", "GROUP": 8, "KEY_HEADS": 8, "ROTARY": 32,
           "WINDOW": 4096, "SPLITS": 8}  # fmt: skip
WIDE = {"HEAD_DIM": 256, "WIDTH": 256}
COMBINE = {
    "rows": "fp16", "sums": "fp32", "peaks": "fp32", "HEADS": 32, "HEAD_DIM": 128, "SPLITS": 8, "WIDTH": 128,
    "OVERLAP": False,
}  # fmt: skip
FLOATS = ("norm_eps", "score_scale")
# A launch rounds them up to whole blocks: they are never 1.
ROUNDED = ("padded", "length", "tokens_a_split")


def build(
    kernel, capability: int, arguments: dict, num_warps: int = 4, num_stages: int = 3, ones: bool = False
) -> tuple[str, str]:
    """Compile for sm_<capability>; return the disassembly and the resource report.

    arguments: element type of a pointer, or the value of a constexpr; every other parameter is an integer,
    aligned to 16 if it is a size or a token stride (the common case: rows of a multiple of 16 items). `ones`: those
    that can be are 1, which a launch makes constants, Python's numbers, whatever the kernel does with them.
    """
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments.get(name, "i32")
        if value is None or (name.isupper() and name not in ("A", "B", "C", "X")):
            signature[name], constexprs[name] = "constexpr", value
        elif name.endswith("stride_column") or (ones and name not in (*arguments, *FLOATS, *ROUNDED)):
            signature[name], constexprs[name] = "constexpr", 1
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = value if name not in arguments else "*" + value
            if (
                name in arguments
                or name in ("padded", "length")
                or name.endswith(("stride_token", "_stride"))
            ):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return disassemble(compiled.asm["cubin"])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
def test_float64_product_uses_double_precision_tensor_cores(capability, dtype):
    sass, resources = build(gram_fp64._product, capability, PRODUCT | {"X": dtype})
    assert "DMMA" in sass
    assert_no_spills(sass, resources)


@pytest.mark.parametrize("capability", [75, 89])
def test_float64_product_is_fma_elsewhere(capability):
    config = gram_fp64.gram_config((capability // 10, capability % 10), 1 << 20, 4096, 128)
    sass, resources = build(gram_fp64._product, capability, PRODUCT, config.num_warps)
    assert "DFMA" in sass
    assert_no_spills(sass, resources)


@pytest.mark.parametrize(("capability", "instruction"), [(80, "HMMA"), (90, "HGMMA")])
def test_fast_product_uses_half_precision_tensor_cores(capability, instruction):
    arguments = PRODUCT | {"X": "bf16", "FAST": True, "BLOCK_K": 32, "weight": None, "skip": None}
    sass, resources = build(gram_fp64._product, capability, arguments)
    assert instruction in sass
    assert_no_spills(sass, resources)


@pytest.mark.parametrize(("capability", "instruction"), [(80, "IMMA"), (89, "IMMA"), (90, "IGMMA")])
def test_integer_product_uses_int8_tensor_cores(capability, instruction):
    config = gram_exact.gram_exact_config((capability // 10, capability % 10), None, 1 << 20, 4096)
    sass, resources = build(gram_exact._multiply, capability, MULTIPLY, config.num_warps, config.num_stages)
    assert instruction in sass
    assert_no_spills(sass, resources)


@pytest.mark.parametrize("capability", [80, 90])
def test_memory_bound_kernels_do_not_spill(capability):
    for kernel, arguments in ((gram_exact._residues, RESIDUES), (gram_exact._reconstruct, RECONSTRUCT)):
        assert_no_spills(*build(kernel, capability, arguments, num_warps=8))


@pytest.mark.parametrize(("capability", "instruction"), [(75, "DFMA"), (80, "DMMA"), (90, "DMMA")])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_cross_product_in_float64(capability, instruction, dtype):
    arch = (capability // 10, capability % 10)
    config = cross_gram.cross_gram_config(arch, 1 << 18, 11008, 4096, 128)
    arguments = CROSS_PRODUCT | {"A": dtype, "B": dtype}
    sass, resources = build(cross_gram._cross_product, capability, arguments, config.num_warps)
    assert instruction in sass
    assert_no_spills(sass, resources)


@pytest.mark.parametrize(("capability", "instruction"), [(80, "HMMA"), (90, "HGMMA")])
def test_fast_cross_product_uses_half_precision_tensor_cores(capability, instruction):
    arguments = CROSS_PRODUCT | {"A": "bf16", "B": "bf16", "FAST": True, "BLOCK_K": 32, "weight": None}
    sass, resources = build(cross_gram._cross_product, capability, arguments)
    assert instruction in sass
    assert_no_spills(sass, resources)


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    "shape", [ATTEND, ATTEND | GROUPED, ATTEND | GROUPED | WIDE], ids=["7b", "grouped", "wide"]
)
def test_decode_attention(shape, dtype, capability):
    """A group of queries multiplies on tensor cores, where they are."""
    if (capability, dtype) == (75, "bf16"):
        pytest.skip("no bfloat16")
    types = {
        name: dtype for name in ("rows", "keys", "values", "cos", "sin", "norm") if shape[name] is not None
    }
    dot, itemsize = shape["GROUP"] >= 4 and dtype != "fp32" and capability >= 80, 4 if dtype == "fp32" else 2
    overlap = {"OVERLAP": capability >= 90}
    for warps in (4,) if dot else (4, 16):
        tile = {
            "DOT": dot,
            "BLOCK_G": 16 if dot else 1,
            "BLOCK_N": block_tokens(shape["WIDTH"], itemsize, dot, warps),
        }
        arguments = shape | types | tile | overlap
        sass, resources = build(decode_attention._attend, capability, arguments, warps, num_stages=2)
        assert_no_spills(sass, resources)
        assert ("HMMA" in sass) == dot
        if (capability, dtype) == (90, "bf16") and shape["WIDTH"] == 128:
            # Of the predictions: another compiler may take a few registers and instructions more or less.
            facts = CODE["decode_attention" + (", group" if dot else ", 16 warps" if warps == 16 else "")]
            assert replace(facts, registers=registers(resources)).blocks == facts.blocks
            assert 0.8 < longest_loop(sass) / facts.loop < 1.25
        assert capability < 90 or overlap_faults(sass) == []
    if shape["SPLITS"] > 1:
        combine = COMBINE | overlap | {"rows": dtype, "HEAD_DIM": shape["HEAD_DIM"], "WIDTH": shape["WIDTH"]}
        sass, resources = build(decode_attention._combine, capability, combine)
        assert_no_spills(sass, resources)
        assert capability < 90 or overlap_faults(sass) == []


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        (gram_fp64._product, PRODUCT),
        (gram_fp64._finish, FINISH),
        (cross_gram._cross_product, CROSS_PRODUCT),
        (cross_gram._add_partials, FINISH),
        (gram_exact._span, SPAN),
        (gram_exact._residues, RESIDUES),
        (gram_exact._multiply, MULTIPLY),
        (gram_exact._reconstruct, RECONSTRUCT),
        (decode_attention._attend, ATTEND),
        (decode_attention._combine, COMBINE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sizes_and_strides_of_one(kernel, arguments):
    """One token, one column: what a launch specialises on has no methods of a tensor."""
    build(kernel, 90, arguments, ones=True)
