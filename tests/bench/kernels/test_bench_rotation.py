"""What the benchmark of the fused GEMMs measures under pytest."""

import itertools

import pytest
import torch

from slicegpt.bench.kernels import rotation_methods
from slicegpt.bench.kernels.bench_rotation import QUICK_MODELS, QUICK_SIZES, ROWS, cases, name_of
from slicegpt.bench.models.shapes import MODELS, SIZES, RotateAddShape, launches
from slicegpt.ops import reference
from slicegpt.ops.cuda import rotate_wgmma


def models_and_sizes(chosen) -> set:
    return {(model, size) for model, size, *_ in chosen}


def test_every_model_at_every_size():
    for chosen in (cases("all", on_gpu=False), cases("", on_gpu=True)):
        assert models_and_sizes(chosen) == set(itertools.product(MODELS, SIZES))
        assert len(chosen) == sum(len(launches(m, *s)) for m in MODELS for s in SIZES) * len(ROWS)
        assert len({name_of(case) for case in chosen}) == len(chosen)
    assert {100 * fraction for fraction, _ in SIZES} == {0, 20, 25, 30, 50}


def test_named_models_and_the_quick_subset():
    chosen = models_and_sizes(cases("phi-2 llama-2-7b", on_gpu=False))
    assert chosen == set(itertools.product(("phi-2", "llama-2-7b"), SIZES))
    assert models_and_sizes(cases("", on_gpu=False)) == set(itertools.product(QUICK_MODELS, QUICK_SIZES))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "added"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_product_is_rotate_add(dense, bias):
    launch = RotateAddShape("out", 40, 24, 24, dense, bias, 0 if dense else 8)
    inputs = rotation_methods.make_inputs(launch, 33, torch.float64, torch.device("cpu"))
    expected, _ = reference.rotate_add(*inputs.tensors.values())
    runs = rotation_methods.methods(launch, inputs, compiled=False)
    # float64: 65 products and sums.
    torch.testing.assert_close(runs["one product, library"](), expected, rtol=1e-12, atol=1e-12)
    errors = rotation_methods.relative_errors(launch, inputs, ["one product, library", "fused"])
    assert max(errors.values()) < 1e-12


def test_few_rows_have_neither_form(monkeypatch):
    """The decode kernels take those; wgmma's rows are measured where its kernel is, on what it can read."""
    launch = RotateAddShape("out", 40, 24, 24, True, False)
    monkeypatch.setattr(rotate_wgmma, "has_wgmma", lambda: True)
    calls = []
    monkeypatch.setattr(rotate_wgmma, "rotate_add", lambda *arguments: calls.append(arguments[-1]))

    def of(rows, dtype):
        inputs = rotation_methods.make_inputs(launch, rows, dtype, torch.device("cpu"))
        on_gpu = rotation_methods.LaunchInputs(inputs.tensors, _OnGpu(inputs.x), inputs.w)
        return rotation_methods.by_wgmma(on_gpu), rotation_methods.methods(launch, inputs, compiled=False)

    kernels, runs = of(33, torch.bfloat16)
    assert list(kernels) == ["fused, wgmma", "fused, wgmma-pairs"]
    for run in kernels.values():
        run()
    assert calls == ["wgmma", "wgmma-pairs"]
    assert "one product, library" in runs
    assert "fused, wgmma" not in runs
    assert of(33, torch.float32)[0] == {}
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "fused")
    assert of(33, torch.bfloat16)[0] == {}
    monkeypatch.delenv("SLICEGPT_ROTATE_PREFILL")
    assert "one product, library" not in of(16, torch.bfloat16)[1]


class _OnGpu:
    """A tensor that says so."""

    is_cuda = True

    def __init__(self, tensor):
        self.tensor = tensor
