"""Prefill in one GEMM a block, `[a | h] [W | S]ᵀ`: the plain model's logits and tokens, and nothing copied together."""

from itertools import pairwise

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import tiny_model, token_ids

from slicegpt.ops import many_rows, torch_gemm
from slicegpt.runtime import Runtime

CHUNK = 8  # two chunks of a prompt, each of more rows than a decode kernel takes


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "library")
    monkeypatch.setattr(many_rows, "few_rows", lambda capability, dtype: 4)


def recorded(monkeypatch):
    """Of every product: the memory that it writes to, and that of the rows that it reads."""
    calls, real = [], torch_gemm.one_product

    def one_product(out, rows, weight, bias):
        calls.append((out.untyped_storage().data_ptr(), rows.untyped_storage().data_ptr()))
        real(out, rows, weight, bias)

    monkeypatch.setattr(torch_gemm, "one_product", one_product)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("operators", [True, False], ids=["operators", "kernels"])
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_dense_shortcuts(monkeypatch, case, operators):
    """Sequential and parallel blocks, biases and none. The float64 model's logits up to the order of its sums."""
    model = sliced(tiny_model(case, torch.float64), widths=40, shortcut="dense")[0]
    ids = token_ids(2, 2 * CHUNK)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected, tokens = model(ids).logits, model.generate(ids, use_cache=False, **options)
    runtime = Runtime(model, prefill_chunk=CHUNK)
    runtime.executor = type(runtime.executor)(runtime.executor.packed, through_operators=operators)
    blocks = runtime.executor.packed.blocks
    assert all(block.joint is not None for block in blocks)
    calls = recorded(monkeypatch)
    torch.testing.assert_close(runtime.logits(ids), expected, rtol=1e-9, atol=1e-9)
    assert len(calls) == 2 * len(blocks)
    # A block writes the stream to where the next one reads it beside its own activations.
    inner = [pair for pair in pairwise(calls) if pair[0] is not calls[len(blocks) - 1]]
    assert all(before[0] == after[1] for before, after in inner)
    assert torch.equal(runtime.generate(ids, max_new_tokens=3, ignore_eos=True), tokens)


@torch.no_grad()
@pytest.mark.parametrize("form", ["compact", "varying", "narrow"])
def test_added_in_place_and_beside_other_blocks(monkeypatch, form):
    """Compact shortcuts: one GEMM onto the stream. Widths that are no multiples of 8 are not joined; some here are."""
    widths, shortcut = {
        "compact": (40, "compact"),
        "varying": ([40, 36, 40, 40, 32, 48, 48], "dense"),
        "narrow": (36, "dense"),
    }[form]
    model = sliced(tiny_model("llama", torch.float64), widths=widths, shortcut=shortcut)[0]
    ids = token_ids(3, CHUNK)
    runtime = Runtime(model, prefill_chunk=CHUNK)
    joined = sum(block.joint is not None for block in runtime.executor.packed.blocks)
    assert (joined > 0) == (form == "varying")
    calls, added = recorded(monkeypatch), []
    real = torch_gemm.add_product_
    monkeypatch.setattr(torch_gemm, "add_product_", lambda *arguments: added.append(1) or real(*arguments))
    torch.testing.assert_close(runtime.logits(ids), model(ids).logits, rtol=1e-9, atol=1e-9)
    assert len(calls) == joined
    assert bool(added) == (form == "compact")


@torch.no_grad()
def test_half_precision_is_as_near_as_the_fused_form(monkeypatch):
    """bfloat16 against the float64 model, on the same rounded weights: at most twice the error of the other path."""
    model = sliced(tiny_model("llama", torch.float32), widths=40, shortcut="dense", dtype=torch.float32)[0]
    model = model.to(torch.bfloat16)
    ids = token_ids(2, CHUNK)
    half = Runtime(model, prefill_chunk=CHUNK).logits(ids).double()
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "fused")
    fused = Runtime(model, prefill_chunk=CHUNK).logits(ids).double()
    exact = model.double()(ids).logits
    assert (half - exact).norm() <= 2 * (fused - exact).norm()


def test_weights_are_counted_once(monkeypatch):
    model = sliced(tiny_model("llama", torch.float64), widths=40, shortcut="dense")[0]
    joined = Runtime(model).executor.packed
    monkeypatch.setenv("SLICEGPT_ROTATE_PREFILL", "fused")
    apart = Runtime(model).executor.packed
    assert all(block.joint is None for block in apart.blocks)
    assert joined.stored_bytes() == apart.stored_bytes()
    assert joined.bytes_per_token() == apart.bytes_per_token()
