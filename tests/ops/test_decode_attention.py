"""`decode_attention_`: against float64 written out, its argument checks, tracing, and a captured call."""

import pytest
import torch
from support.attention_inputs import Shape, arguments, assert_attended

from slicegpt.errors import SliceGPTError
from slicegpt.ops import decode_attention_
from slicegpt.ops.decode_attention import DISPATCHER, is_supported

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMALL = Shape(batch=2, heads=4, key_heads=2, head_dim=12, rotary=8, norm=True)
SHAPES = {
    "7b": Shape(batch=2, heads=4, key_heads=4, head_dim=128, rotary=128),
    "groups": Shape(batch=3, heads=16, key_heads=2, head_dim=64, rotary=64),
    "small": SMALL,
    "phi-2": Shape(batch=1, heads=4, key_heads=4, head_dim=80, rotary=32),
    "gemma": Shape(batch=1, heads=8, key_heads=1, head_dim=256, rotary=256),
    "hunyuan": Shape(batch=2, heads=4, key_heads=2, head_dim=12, rotary=8, norm=True, rotate_first=True),
    "opt": Shape(batch=2, heads=3, key_heads=3, head_dim=64, rotary=None),
}


def run(inputs):
    """The arguments after the call."""
    outputs = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in inputs)
    # A clone of a part of a matrix is contiguous; the operator takes any row stride.
    wide = torch.zeros(len(inputs[0]), inputs[0].shape[1] + 3, dtype=inputs[0].dtype, device=inputs[0].device)
    rows = wide[:, : inputs[0].shape[1]].copy_(inputs[0])
    decode_attention_(rows, *outputs[1:])
    return rows, *outputs[1:]


# What is masked must still be finite for PyTorch's attention, which multiplies it by a weight of zero.
def finite(inputs):
    return tuple(one.nan_to_num() if isinstance(one, torch.Tensor) else one for one in inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_a_cpu(shape, dtype):
    inputs = finite(arguments(shape, 97, dtype))
    assert_attended(run(inputs), inputs)


@pytest.mark.parametrize(("window", "slot"), [(1, 50), (5, 3), (5, 150), (300, 130), (None, 0)])
def test_windows(window, slot):
    inputs = finite(arguments(SMALL, slot, torch.float64, window=window))
    assert_attended(run(inputs), inputs)


def test_no_rows():
    rows, empty = torch.zeros(0, 96), torch.zeros(0, 2, 8, 12)
    valid = torch.ones(0, 8, dtype=torch.bool)
    decode_attention_(rows, empty, empty.clone(), valid, torch.tensor([3]), heads=4)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (
            0,
            lambda rows: rows[:, :95],
            r"rows must be \[2, at least 96\] with unit column stride, got \[2, 95\]",
        ),
        (0, lambda rows: rows.int(), "rows must be float16, bfloat16, float32 or float64, got torch.int32"),
        (1, lambda keys: keys[0], r"keys must be \[batch, key_heads, capacity, head_dim\]"),
        (2, lambda values: values[:, :, 1:], "values must have keys' shape"),
        (2, lambda values: values.half(), "values must have rows' dtype torch.float32, got torch.float16"),
        (3, lambda valid: valid.int(), r"valid must be bool \[2, 200\], got torch.int32"),
        (4, lambda slot: slot[0], r"slot must be int64 \[1\], got torch.int64 \[\]"),
        (5, lambda cos: None, "sin must be given where cos is, got True"),
        (6, lambda sin: sin[:, :, :7], r"sin must be \[2, 1, an even number up to 12\], cos and sin alike"),
        (7, lambda norm: norm[1:], r"norm must be \[6, 12\], got \[5, 12\]"),
        (8, lambda heads: 3, "heads must be a multiple of 2 key heads, got 3"),
        (9, lambda window: 0, "window must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(index, change, message):
    inputs = list(arguments(SMALL, 5, torch.float32))
    inputs[index] = change(inputs[index])
    with pytest.raises(SliceGPTError, match=f"decode_attention_: {message}"):
        decode_attention_(*inputs)


def test_opcheck():
    inputs = finite(arguments(SMALL, 5, torch.float32))
    torch.library.opcheck(torch.ops.slicegpt.decode_attention_.default, inputs)


def test_what_is_chosen():
    pytest.importorskip("triton")
    find = DISPATCHER.find
    assert find("auto", None, torch.float32, 64) == "reference"
    assert find("auto", (9, 0), torch.bfloat16, 128) == "triton"
    assert find("auto", (7, 5), torch.float16, 80) == "triton"
    assert find("auto", (7, 5), torch.bfloat16, 80) == "reference"
    assert find("auto", (7, 0), torch.float16, 80) == "reference"
    assert find("auto", (9, 0), torch.float64, 128) == "reference"
    assert find("auto", (9, 0), torch.float16, 512) == "reference"
    assert find("reference", (9, 0), torch.float16, 128) == "reference"
    # There is no CUDA C++ form: as with auto. There is a Triton form: what it does not take is refused.
    for capability, dtype, head_dim in (((9, 0), torch.bfloat16, 128), (None, torch.float32, 64)):
        assert find("cuda", capability, dtype, head_dim) == find("auto", capability, dtype, head_dim)
    assert find("triton", (9, 0), torch.float64, 128) is None
    assert not is_supported(None, torch.float32, 64, "triton")
    with pytest.raises(
        SliceGPTError,
        match=r"backend 'triton' does not take torch.float64, heads of 128 on compute",
    ):
        DISPATCHER.choose("triton", (9, 0), torch.float64, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_the_gpu(monkeypatch, shape, window, dtype, backend):
    monkeypatch.setenv("SLICEGPT_BACKEND", backend)
    for slot in (0, 97, 199):
        inputs = arguments(shape, slot, dtype, window=window, device="cuda")
        if (
            DISPATCHER.choose(backend, torch.cuda.get_device_capability(), dtype, shape.head_dim)
            == "reference"
        ):
            inputs = finite(inputs)
        assert_attended(run(inputs), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [200, 4096])
def test_a_captured_call_follows_the_slot(capacity):
    """One graph for every token, with one split or several; every replay equals the same steps one by one."""
    shape = SHAPES["groups"]
    rows, _, _, _, slot, cos, sin, *_ = arguments(shape, 0, torch.float16, device="cuda")
    cache = torch.zeros(2, 2, shape.batch, shape.key_heads, capacity, shape.head_dim, device="cuda").half()
    valid = torch.ones(shape.batch, capacity, dtype=torch.bool, device="cuda")
    captured, source = rows.clone(), rows.clone()

    def step(out, keys, values):
        out.copy_(source)
        decode_attention_(out, keys, values, valid, slot, cos, sin, None, shape.heads)

    step(captured, *cache[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, *cache[0])
    for token in range(40):
        slot.fill_(token)
        source.copy_(rows * (1 + token / 40))
        graph.replay()
        eager = rows.clone()
        step(eager, *cache[1])
        assert torch.equal(captured, eager)
        assert torch.equal(cache[0], cache[1])
