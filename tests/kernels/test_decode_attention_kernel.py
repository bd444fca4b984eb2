"""The Triton kernels of `decode_attention_` in the interpreter, against float64."""

import pytest
import torch

pytest.importorskip("triton")
from support.attention_inputs import Shape, arguments, assert_attended

from slicegpt.kernels.attention_config import splits_for
from slicegpt.ops.contracts import DecodeAttentionInputs

SHAPES = {
    "groups of 12": Shape(batch=3, heads=4, key_heads=2, head_dim=12, rotary=12),
    "one group, part of it turned": Shape(batch=1, heads=8, key_heads=1, head_dim=64, rotary=20),
    "no groups, no rotary": Shape(batch=2, heads=3, key_heads=3, head_dim=40, rotary=None),
    "more than 16 in a group": Shape(batch=1, heads=18, key_heads=1, head_dim=16, rotary=16),
    "norm": Shape(batch=2, heads=6, key_heads=2, head_dim=16, rotary=16, norm=True),
    "norm behind": Shape(batch=2, heads=6, key_heads=2, head_dim=20, rotary=16, norm=True, rotate_first=True),
    "norm, wide": Shape(batch=1, heads=2, key_heads=1, head_dim=160, rotary=160, norm=True),
}


@pytest.fixture(scope="module")
def run(interpreter):
    """Runs in the interpreter: float32 and float16 (it reads bfloat16 wrongly). Returns the arguments afterwards."""

    def call(*inputs, splits):
        module, whole = "slicegpt.kernels.decode_attention", DecodeAttentionInputs(*inputs)
        after = interpreter(module, "decode_attention_", whole, splits=splits)[0]
        return after.rows, after.keys, after.values

    return call


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("slot", "dtype"), [(0, torch.float32), (64, torch.float32), (97, torch.float16), (199, torch.float32)]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(run, shape, slot, splits, dtype):
    """A cache of nothing, of a whole block, of splits that are empty, of all but one; padding in the first of them."""
    inputs = arguments(shape, slot, dtype)
    assert_attended(run(*inputs, splits=splits), inputs)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("window", "slot"), [(1, 50), (5, 3), (5, 150), (100, 130), (300, 130)])
def test_windows(run, window, slot, splits):
    inputs = arguments(SHAPES["groups of 12"], slot, torch.float32, window=window)
    assert_attended(run(*inputs, splits=splits), inputs)


def test_large_scores(run):
    """Scores of some thousand: exponentials are taken from the largest, whichever split has it."""
    inputs = arguments(SHAPES["one group, part of it turned"], 180, torch.float32, size=20.0)
    assert_attended(run(*inputs, splits=2), inputs)


def test_splits():
    assert splits_for(capacity=192, programs=32, multiprocessors=132) == 1
    assert splits_for(capacity=4096, programs=32, multiprocessors=132) == 8
    assert splits_for(capacity=131072, programs=8, multiprocessors=132) == 32
    assert splits_for(capacity=131072, programs=1, multiprocessors=132) == 64
    assert splits_for(capacity=4096, programs=32 * 64, multiprocessors=132) == 1
