"""Packed weights: their bits, what they stand for, and the layers that hold them."""

import pytest
import torch
from torch.nn import functional

from slicegpt.conversion.rounding import round_to_nearest
from slicegpt.modeling.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    WeightScheme,
    pack,
    scheme_of,
    unpack,
)

SCHEMES = [WeightScheme(8), WeightScheme(4, 32), WeightScheme(4, 32, symmetric=False)]


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 32), (3, 41), (8, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_codes_come_back(bits, shape, dim):
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    codes.view(-1)[:2] = torch.tensor([-half, half - 1], dtype=torch.int8)[: codes.numel()]
    packed = pack(codes, bits, dim)
    words = -(-shape[dim] * bits // 32)
    assert packed.dtype == torch.int32
    assert packed.shape == ((words, shape[1]) if dim == 0 else (shape[0], words))
    assert torch.equal(unpack(packed, bits, shape, dim), codes)


def test_the_first_column_has_the_lowest_bits():
    codes = torch.tensor([[-8, -7, 7, 0]], dtype=torch.int8)
    assert pack(codes, 4).item() == 0x8F10
    assert pack(codes, 8).item() & 0xFFFFFFFF == 0x80877978


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_packs_and_unpacks_the_same(scheme, dtype):
    """compressed-tensors' own compressor gives these tensors, and the weight that they stand for, bit for bit."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    args = quantization.QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    library = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    matrix = round_to_nearest(weight(12, 96), scheme, dtype)
    entries = {name.removeprefix("x."): tensor for name, tensor in matrix.entries("x").items()}
    theirs = compressor.decompress(entries, library)["weight"]
    assert torch.equal(theirs, matrix.dequantise())
    if dtype == torch.bfloat16:
        return  # it would round the weight's own 8 bits, in which codes of 8 bits do not all come back
    given = {"weight": theirs, "weight_scale": matrix.grid.scale, "weight_zero_point": matrix.grid.zero_point}
    packed = compressor.compress(given, library)
    for name in entries.keys() - {"weight_scale"}:
        assert torch.equal(packed[name], entries[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_compute_with_what_is_stored(scheme):
    matrix = round_to_nearest(weight(24, 96), scheme, torch.float32)
    layer = QuantizedLinear(96, 24, bias=True, scheme=scheme)
    state = {name.removeprefix("x."): tensor for name, tensor in matrix.entries("x").items()}
    layer.load_state_dict(state | {"bias": torch.arange(24.0)})
    inputs = weight(3, 96)
    assert torch.equal(layer.dequantize(), matrix.dequantise())
    assert torch.equal(layer(inputs), functional.linear(inputs, matrix.dequantise(), torch.arange(24.0)))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    wide = layer.double()
    assert wide.weight_packed.dtype == torch.int32
    assert wide.weight.dtype == torch.float64


def test_an_embedding_looks_its_rows_up():
    matrix = round_to_nearest(weight(10, 22), WeightScheme(8), torch.bfloat16)
    table = QuantizedEmbedding(10, 22, WeightScheme(8))
    table.load_state_dict({name.removeprefix("x."): each for name, each in matrix.entries("x").items()})
    ids = torch.tensor([[3, 3, 9], [0, 1, 2]])
    assert torch.equal(table.bfloat16()(ids), functional.embedding(ids, matrix.dequantise()))


def test_what_is_not_understood_is_refused():
    def config(**changes):
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
        group = {"targets": ["re:.*q_proj$"], "weights": weights | changes.pop("weights", {})}
        whole = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": group},
        }
        return type("Config", (), {"quantization_config": whole | changes})

    assert scheme_of(config(), "layers.0.self_attn.q_proj") == WeightScheme(8)
    assert scheme_of(config(), "layers.0.self_attn.k_proj") is None
    assert scheme_of(object(), "q_proj") is None
    with pytest.raises(ValueError, match="must be of compressed-tensors in the format pack-quantized, got"):
        scheme_of(config(format="float-quantized"), "q_proj")
    with pytest.raises(ValueError, match=r"q_proj must have integers of 4 or 8 bits, got 8 of type float"):
        scheme_of(config(weights={"type": "float"}), "q_proj")
