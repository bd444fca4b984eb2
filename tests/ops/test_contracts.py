"""What all implementations share: codes that csrc/ knows as well, output shapes, overlapping memory."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from slicegpt.ops import contracts
from slicegpt.ops.contracts import ACTIVATIONS, DTYPES, GATED, DecodeAttentionInputs, NormLinearInputs

TYPES = (Path(__file__).parents[2] / "csrc" / "types.h").read_text(encoding="utf-8")


def enumerators(name: str) -> dict[str, int]:
    """Of an enum class in csrc/types.h: their names without the k, in lower case and without underscores."""
    body = re.search(rf"enum class {name} : int {{([^}}]*)}}", TYPES)[1]
    return {word.lower(): int(value) for word, value in re.findall(r"k(\w+) = (\d+)", body)}


def test_codes_are_those_of_the_kernels():
    dtypes = {str(dtype).removeprefix("torch."): contracts.dtype_code(dtype) for dtype in DTYPES}
    assert dtypes == enumerators("Dtype")
    activations = {name.replace("_", ""): contracts.activation_code(name) for name in ACTIVATIONS}
    assert activations == enumerators("Activation")
    for name in GATED:
        assert contracts.activation_code(name) == contracts.activation_code(name.removesuffix("_gated"))
    assert int(re.search(r"kSumColumns = (\d+)", TYPES)[1]) == contracts.SUMSQ_COLUMNS


@pytest.mark.parametrize(
    ("operator", "inputs"), [("norm_linear", NormLinearInputs), ("decode_attention_", DecodeAttentionInputs)]
)
def test_inputs_are_the_schema_s_arguments_in_order(operator, inputs):
    import slicegpt.ops  # noqa: F401 (registers the operators)

    schema = getattr(torch.ops.slicegpt, operator).default._schema
    assert [argument.name for argument in schema.arguments] == [field.name for field in fields(inputs)]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED])
def test_outputs_of_norm_linear(activation):
    inputs = NormLinearInputs(torch.ones(3, 4), torch.ones(10, 4), None, None, 6, activation, 4.0, 0.0)
    columns = 3 + 4 if activation in GATED else 10
    assert inputs.columns == columns
    assert inputs.output().shape == (3, columns)
    assert inputs.gated == (activation in GATED)


def test_contiguous_copies_only_what_needs_it():
    wide, bias = torch.ones(3, 8), torch.ones(10)
    plain = NormLinearInputs(wide[:, :4], torch.ones(10, 4), bias[:6], None, 6, "none", 4.0, 0.0)
    same = plain.contiguous()
    assert all(getattr(same, name) is getattr(plain, name) for name in ("h", "bias", "sumsq"))
    assert same.weight.data_ptr() == plain.weight.data_ptr()
    strided = NormLinearInputs(wide[:, ::2], torch.ones(4, 10).T, bias[:6], None, 6, "none", 4.0, 0.0)
    copied = strided.contiguous()
    assert copied.h.stride(1) == 1
    assert copied.weight.is_contiguous()
    assert torch.equal(copied.weight, strided.weight)


def test_sums_of_squares_cover_32_columns():
    h = torch.arange(70.0)[None]
    expected = [float((h[0, start : start + 32] ** 2).sum()) for start in (0, 32, 64)]
    assert contracts.block_sums_of_squares(h).tolist() == [expected]
    for dtype in DTYPES:
        outputs = contracts.sumsq_output(h.to(dtype))
        assert outputs.shape == (1, 3)
        assert outputs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_overlap_is_of_the_ranges_that_tensors_span():
    base = torch.zeros(10, 4)
    assert contracts.overlap(base, base[3:])
    assert contracts.overlap(base[:, 0], base[:, 1])  # interleaved: conservative
    assert not contracts.overlap(base[:3], base[3:])
    assert not contracts.overlap(base, base[:0])
    assert not contracts.overlap(base, base.clone())
