"""The runtime on weights of 8 and 4 bits, against the network with the same numbers in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.quantized_weights import rounded
from support.sliced_models import LENGTHS, network
from support.tiny_models import left_padding, relative_error, token_ids
from torch import nn

from slicegpt.conversion.rounding import round_to_nearest as quantize
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.quantized import QuantizedEmbedding, QuantizedLinear, WeightScheme
from slicegpt.ops.cpu import extension
from slicegpt.ops.panels import PanelWeight
from slicegpt.runtime import Runtime, to_canonical
from slicegpt.runtime.executor import Executor
from slicegpt.runtime.linear_weights import Codes, WeightReader
from slicegpt.runtime.packing import pack, weight_reader
from slicegpt.runtime.rounding import round_to_nearest

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

# 64 columns, of which a slice leaves 36, and 96 neurons.
CHANGES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "phi": {"hidden_size": 64, "intermediate_size": 96},
    "qwen3-tied": {"hidden_size": 64, "intermediate_size": 96},
    "olmo2": {"hidden_size": 64, "intermediate_size": 96},  # norms behind its blocks
}


def codes_of(module: nn.Module, table: bool, bits: int) -> Codes:
    """Tables by row in 8 bits, layers in groups of 32 with 4 where their columns allow it."""
    if table or bits == 8 or module.weight.shape[1] % 32:
        return rounded(module)
    return rounded(module, 4, 32)


def widened(value):
    """The same numbers, dense and in float64."""
    if isinstance(value, PanelWeight):
        return value.double()
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, tuple):
        return tuple(widened(one) for one in value)
    if hasattr(value, "__dataclass_fields__"):
        found = {name: widened(getattr(value, name)) for name in value.__dataclass_fields__}
        return replace(value, **found)
    return value


@torch.inference_mode()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("case", "form"),
    [
        (case, form)
        for case in CHANGES
        for form in ("dense", "compact")
        if (case, form) != ("olmo2", "compact")
    ],
)
def test_logits_and_tokens(case, form, bits):
    """A prompt in chunks, and tokens by the fused step: every number of a row loses 0.5 / 32767 of the largest of 32,
    a few times of what it is itself, in each of a dozen products: 1e-3 in all."""
    plain = to_canonical(network(case, form, torch.float32, **CHANGES[case]))
    runtime, exact = (Runtime(plain, prefill_chunk=5) for _ in range(2))
    packed = pack(plain, reader=WeightReader(partial(codes_of, bits=bits)))
    assert packed.bits()[-1] == bits
    assert isinstance(packed.embedding, PanelWeight)
    runtime.executor = Executor(packed)
    exact.executor = Executor(replace(widened(packed), dtype=torch.float64))
    ids, mask = left_padding(token_ids(), LENGTHS)
    actual, expected = runtime.logits(ids, mask), exact.logits(ids, mask)
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < 1e-3
    assert runtime.decoder_name(len(ids)) == ("growing" if case == "olmo2" else "fused")
    tokens = runtime.generate(ids, mask, max_new_tokens=6, ignore_eos=True)
    mask = torch.cat((mask, mask.new_ones(len(ids), 6)), dim=1)
    expected = exact.logits(tokens, mask)[:, -7:-1]
    chosen = expected.gather(2, tokens[:, -6:, None])[..., 0]
    assert ((expected.amax(dim=2) - chosen) < 2e-3 * expected.abs().amax()).all()


def test_sizes_are_those_of_what_is_stored():
    plain = network("llama", "compact", torch.bfloat16)
    whole, packed = pack(plain), pack(plain, reader=weight_reader(plain, "int8"))
    assert (whole.bits(), packed.bits()) == ([], [8])
    weights = [one.weight for block in packed.blocks for one in block.inputs]
    weights += [block.output for block in packed.blocks] + [packed.head.weight, packed.embedding]
    assert all(isinstance(one, PanelWeight) for one in weights)
    assert packed.stored_bytes() - sum(one.nbytes for one in weights) == sum(
        tensor.nbytes for tensor in packed._weights() if isinstance(tensor, torch.Tensor)
    )
    assert packed.bytes_per_token() == packed.stored_bytes() - packed.embedding.nbytes + (
        packed.embedding.nbytes // len(packed.embedding)
    )


def test_without_kernels_weights_are_dense():
    plain = network("phi", "compact", torch.float32)
    packed = pack(plain, reader=WeightReader(codes_of, panels=False))
    assert packed.bits() == []
    assert torch.equal(packed.blocks[0].output, pack(plain).blocks[0].output)


def test_rounding_to_nearest():
    """Codes of numbers on the grid are found again; off it they are within half of a step."""
    grid = torch.arange(-8, 8.0).repeat(3, 4) * torch.tensor([[0.5], [-0.25], [2.0]])
    codes = round_to_nearest(grid, 4, 32)
    values = codes.codes.float() * codes.scales.repeat_interleave(32, dim=1)
    assert torch.equal(values, grid)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    for bits, group in ((8, None), (4, 32)):
        codes = round_to_nearest(weight, bits, group)
        scales = codes.scales.repeat_interleave(64 // codes.scales.shape[1], dim=1)
        # the longer side's last code is exact, the shorter one may end half a step beyond the last one
        assert ((codes.codes * scales - weight).abs() <= 1.01 * scales.abs()).all()
        assert ((codes.codes * scales - weight).abs() <= 0.501 * scales.abs()).double().mean() > 0.9
    assert not codes.codes[3].any()


def test_weights_are_rounded_on_request():
    plain = network("llama", "compact", torch.float32)
    runtime = Runtime(plain, weights="int8")
    assert runtime.executor.packed.weights_text() == "float32, 8-bit weights"
    assert runtime.bytes_per_token() < 0.5 * Runtime(plain).bytes_per_token()
    ids = token_ids()
    assert 1e-4 < relative_error(runtime.logits(ids), plain(ids).logits) < 0.1
    with pytest.raises(SliceGPTError, match="weights: must be one of int8, int4, got 'int3'"):
        Runtime(plain, weights="int3")
    with pytest.raises(
        SliceGPTError, match=r"weights: 'int8' needs the CPU's kernels .* got torch.float64 on cpu"
    ):
        Runtime(plain.double(), weights="int8")


@pytest.mark.parametrize(
    "scheme", [WeightScheme(8), WeightScheme(4, 32), WeightScheme(4, 32, symmetric=False)]
)
def test_stored_layers_are_read_as_they_are(scheme):
    """The codes of `slicegpt.modeling.quantized`, of one layer and of two, are the numbers that it stands for."""
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    entries = quantize(weight, scheme, torch.float32).entries("x")
    layer, table = QuantizedLinear(96, 24, False, scheme), QuantizedEmbedding(24, 96, WeightScheme(8))
    layer.load_state_dict({name.removeprefix("x."): tensor for name, tensor in entries.items()})
    reader = WeightReader()
    assert isinstance(found := reader.below([layer, layer], gated=True), PanelWeight)
    assert torch.equal(found.dense(torch.float32), torch.cat([layer.dequantize()] * 2))
    found = reader.beside([layer, layer])
    assert torch.equal(found.dense(torch.float32), torch.cat([layer.dequantize()] * 2, dim=1))
    assert torch.equal(WeightReader(panels=False).below([layer]), layer.dequantize())
    if scheme.bits == 8:
        table.load_state_dict({name.removeprefix("x."): tensor for name, tensor in entries.items()})
        ids = torch.tensor([3, 20, 3])
        assert torch.equal(reader.table(table).take(ids), table(ids))
