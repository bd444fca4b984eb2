"""GPTQ against the optimal brain surgeon done column by column, and against rounding to nearest."""

import pytest
import torch

from slicegpt.conversion.rounding import QuantizedMatrix, fit_grid, round_to_nearest
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.quantized import WeightScheme
from slicegpt.slicing.gptq import Segment, gptq

SCHEMES = {
    "int8": WeightScheme(8),
    "int4": WeightScheme(4, 32),
    "int4 with zero points": WeightScheme(4, 32, symmetric=False),
}


def problem(rows: int = 6, columns: int = 160, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated moments of very different sizes. More columns than one block of the algorithm has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mixing = torch.eye(columns, dtype=torch.float64) + 2 * normal(columns, 8) @ normal(8, columns)
    activations = normal(400, columns) @ mixing * (0.5 * normal(columns)).exp()
    return normal(rows, columns), activations.mT @ activations / 400


def loss(delta: torch.Tensor, moments: torch.Tensor) -> float:
    return (delta @ moments * delta).sum().item()


def brain_surgeon(weight, moments, segments, dtype):
    """Hassibi and Stork's update with the inverse of the remaining columns' moments: round the column with the largest
    moment, move all others by what makes up best for it, and take it out of the inverse.
    """
    weight, inverse = weight.clone(), torch.linalg.inv(moments)
    scales, zeros, first = [], [], 0
    for segment in segments:
        if segment.scheme is None:
            continue
        own = slice(first, first + segment.columns)
        grid = fit_grid(weight[:, own], segment.scheme, dtype)
        repeats = segment.columns // grid.scale.shape[1]
        scales.append(grid.scale.double().repeat_interleave(repeats, dim=1))
        zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        zeros.append(zero.double().repeat_interleave(repeats, dim=1))
        first = own.stop
    scales, zeros, half = torch.cat(scales, dim=1), torch.cat(zeros, dim=1), 1 << (grid.bits - 1)
    codes = torch.zeros(len(weight), first, dtype=torch.int8)
    for column in torch.argsort(moments.diagonal()[:first], descending=True, stable=True).tolist():
        code = (torch.round(weight[:, column] / scales[:, column]) + zeros[:, column]).clamp(-half, half - 1)
        codes[:, column] = code.to(torch.int8)
        value = ((code - zeros[:, column]) * scales[:, column]).to(dtype).double()
        step = (value - weight[:, column]) / inverse[column, column]
        weight += step[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, weight[:, first:]


@pytest.mark.parametrize("kind", SCHEMES)
def test_columns_are_rounded_as_by_the_brain_surgeon(kind):
    weight, moments = problem()
    segments = [Segment(96, SCHEMES[kind]), Segment(32, SCHEMES[kind]), Segment(32, None)]
    matrices, rest = gptq(weight, moments, segments, torch.float32)
    codes, expected = brain_surgeon(weight, moments, segments, torch.float32)
    # Both are exact but for rounding in float64: no target lies within 1e-9 of the middle between two codes here.
    assert torch.equal(torch.cat([matrix.codes for matrix in matrices], dim=1), codes)
    torch.testing.assert_close(rest, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", SCHEMES)
def test_it_loses_less_than_rounding_to_nearest(kind):
    weight, moments = problem(rows=16)
    (matrix,), _ = gptq(weight, moments, [Segment(160, SCHEMES[kind])], torch.bfloat16)
    nearest = round_to_nearest(weight, SCHEMES[kind], torch.bfloat16)
    losses = [loss(weight - each.dequantise().double(), moments) for each in (matrix, nearest)]
    assert losses[0] < 0.75 * losses[1]


def test_what_stays_plain_makes_up_for_the_rest():
    """The rest is the best there is for the rounded columns: the derivative of the loss by it is 0."""
    weight, moments = problem()
    (matrix,), rest = gptq(weight, moments, [Segment(128, SCHEMES["int4"]), Segment(32, None)], torch.float32)
    delta = weight - torch.cat((matrix.dequantise().double(), rest), dim=1)
    slope = (delta @ moments)[:, 128:]
    assert slope.abs().max() < 1e-9 * (weight @ moments).abs().max()


def test_a_column_that_is_always_zero():
    weight, moments = problem()
    moments[:, 7] = moments[7] = 0
    (matrix,), _ = gptq(weight, moments, [Segment(160, SCHEMES["int4"])], torch.float32)
    assert matrix.codes.shape == weight.shape
    assert (weight - matrix.dequantise().double())[:, 7].abs().max() < 1


def test_moments_without_full_rank_are_damped(caplog):
    weight, moments = problem()
    few = moments[:, :20] @ moments[:20]
    few = few @ few.mT
    (matrix,), _ = gptq(weight, few, [Segment(160, SCHEMES["int8"])], torch.float32)
    assert matrix.dequantise().isfinite().all()
    assert "Cholesky failed" in caplog.text
    with pytest.raises(SliceGPTError, match="quantize: no Cholesky factor of moments of 160 columns"):
        gptq(weight, -moments, [Segment(160, SCHEMES["int8"])], torch.float32)


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_grid_holds_its_groups(kind):
    """Every number of a group lies within half a step of a code, but for what clipping takes from the longest ones."""
    weight, _ = problem(rows=8)
    scheme = SCHEMES[kind]
    grid = fit_grid(weight, scheme, torch.float32)
    rounded = QuantizedMatrix(grid.round(weight.view(*grid.scale.shape, -1)).view(weight.shape), grid)
    error = (rounded.dequantise().double() - weight).view(*grid.scale.shape, -1)
    steps = error / grid.scale.abs().double()[..., None]
    # A scale is rounded to float32: 128 codes times 2^-24 of it.
    assert (steps.abs() < 0.5 + 1e-4).double().mean() > 0.9
    half = 1 << (scheme.bits - 1)
    assert rounded.codes.amin() >= -half
    assert rounded.codes.int().amax() < half


def test_a_group_of_zeros_has_a_scale():
    weight = torch.zeros(2, 64, dtype=torch.float64)
    for scheme in (*SCHEMES.values(), WeightScheme(4, 64)):
        rounded = round_to_nearest(weight, scheme, torch.float16)
        assert torch.equal(rounded.grid.scale, torch.ones_like(rounded.grid.scale))
        assert not rounded.dequantise().any()
