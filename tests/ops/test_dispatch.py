"""The dispatcher: what a requested backend means, which implementation is taken, what is logged and refused."""

import pytest
import torch

from slicegpt.errors import SliceGPTError
from slicegpt.ops.cross_gram import DISPATCHER as CROSS_GRAM
from slicegpt.ops.decode_attention import DISPATCHER as DECODE_ATTENTION
from slicegpt.ops.dispatch import BACKENDS, Dispatcher, GemmDispatcher, Implementation, requested_backend
from slicegpt.ops.gram import DISPATCHER as GRAM
from slicegpt.ops.norm_linear import DISPATCHER as NORM_LINEAR
from slicegpt.ops.rotate_add import DISPATCHER as ROTATE_ADD

HALF, DOUBLE = torch.float16, torch.float64
HOPPER, TURING = (9, 0), (7, 5)


def dispatcher() -> Dispatcher:
    """An operator with two CUDA forms, one on Triton for sm_80 on, a CPU form and a reference; detail: a size."""
    return Dispatcher(
        "toy",
        (
            Implementation("small", lambda _, dtype, size: dtype is not DOUBLE and size <= 8, "cuda", "cuda"),
            Implementation(
                "triton", lambda capability, dtype, _: capability >= (8, 0) and dtype is HALF, "cuda"
            ),
            Implementation("large", lambda _, dtype, size: dtype is not DOUBLE, "cuda", "cuda"),
            Implementation("cpu", lambda _, dtype, size: size <= 4, "cpu"),
            Implementation("reference", lambda _, dtype, size: size < 100),
        ),
        describe=lambda _, dtype, size: f"size {size}",
    )


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "size", "name"),
    [
        ("auto", HOPPER, HALF, 8, "small"),
        ("auto", HOPPER, HALF, 9, "triton"),
        ("auto", TURING, HALF, 9, "large"),
        ("auto", HOPPER, DOUBLE, 9, "reference"),
        ("auto", None, HALF, 4, "cpu"),
        ("auto", None, HALF, 5, "reference"),
        ("auto", None, HALF, 100, None),
        ("cuda", HOPPER, HALF, 8, "small"),
        ("cuda", HOPPER, HALF, 9, "large"),  # a backend may have several implementations
        ("triton", HOPPER, HALF, 8, "triton"),
        ("reference", HOPPER, HALF, 8, "reference"),
        # What exists and does not take the dtype, the device or the size is not replaced.
        ("cuda", HOPPER, DOUBLE, 8, None),
        ("triton", TURING, HALF, 8, None),
        ("triton", None, HALF, 8, None),
        ("reference", None, HALF, 100, None),
    ],
)
def test_the_first_that_takes_the_call(backend, capability, dtype, size, name):
    toy = dispatcher()
    assert toy.find(backend, capability, dtype, size) == name
    assert toy.is_supported(backend, capability, dtype, size) == (name is not None)
    if name is not None:
        assert toy.choose(backend, capability, dtype, size) == name


def test_a_backend_that_the_operator_has_not_is_no_obstacle(caplog):
    whole = dispatcher()
    without = Dispatcher("toy", [one for one in whole.implementations if one.backend != "cuda"])
    assert not without.has("cuda")
    for capability, dtype in ((HOPPER, HALF), (HOPPER, DOUBLE), (TURING, HALF), (None, HALF)):
        assert without.find("cuda", capability, dtype, 3) == without.find("auto", capability, dtype, 3)
    with caplog.at_level("INFO", logger="slicegpt"):
        for _ in range(3):
            assert without.choose("cuda", HOPPER, HALF, 3) == "triton"
    assert caplog.messages == [
        "toy: torch.float16, 3 on compute capability 9.0: triton (it has no 'cuda' implementation)"
    ]


def test_the_choice_is_logged_once_and_forgotten_on_request(caplog):
    toy = dispatcher()
    with caplog.at_level("INFO", logger="slicegpt"):
        for _ in range(3):
            toy.choose("auto", None, HALF, 2)
        toy.find("auto", None, HALF, 3)
        toy.forget()
        toy.choose("auto", None, HALF, 2)
    assert caplog.messages == ["toy: torch.float16, size 2 on a CPU: cpu"] * 2


def test_refusals_say_what_was_asked_for():
    with pytest.raises(
        SliceGPTError,
        match=r"^toy: backend 'cuda' does not take torch.float64, size 8 on compute capability 9\.0$",
    ):
        dispatcher().choose("cuda", HOPPER, DOUBLE, 8)


def test_every_operator_has_a_reference_and_no_backend_beyond_those_that_can_be_asked_for():
    for operator in (GRAM, CROSS_GRAM, NORM_LINEAR, ROTATE_ADD, DECODE_ATTENTION):
        assert all(operator.has(backend) for backend in ("auto", "triton", "reference"))
        assert operator.has("cuda") == (operator.op in ("gram_", "norm_linear", "rotate_add"))
        for capability in (None, HOPPER):
            for dtype in (HALF, torch.bfloat16, torch.float32, DOUBLE):
                detail = {"gram_": "fp64", "cross_gram_": "fp64"}.get(operator.op, 64)
                assert operator.find("reference", capability, dtype, detail) == "reference"


def test_rows_beyond_the_limit_for_few_are_one_class(caplog):
    gemm = GemmDispatcher("norm_linear")
    with caplog.at_level("INFO", logger="slicegpt"):
        names = {gemm.choose("reference", HOPPER, HALF, rows) for rows in (1, 5, 16, 17, 4000)}
    assert names == {"reference"}
    assert caplog.messages == [
        f"norm_linear: torch.float16, {rows} on compute capability 9.0: reference"
        for rows in ("at most 16 rows", "more than 16 rows")
    ]


def test_the_environment_names_the_backend(monkeypatch):
    monkeypatch.delenv("SLICEGPT_BACKEND", raising=False)
    assert requested_backend() == "auto"
    for backend in BACKENDS:
        monkeypatch.setenv("SLICEGPT_BACKEND", backend)
        assert requested_backend() == backend
    monkeypatch.setenv("SLICEGPT_BACKEND", "cpu")
    with pytest.raises(
        SliceGPTError, match="SLICEGPT_BACKEND must be one of auto, cuda, triton, reference, got 'cpu'"
    ):
        requested_backend()
