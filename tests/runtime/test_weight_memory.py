"""Packed weights on memory of their own."""

import gc

import pytest
import torch
from support.quantized_weights import panels, random_codes
from support.sliced_models import network
from support.tiny_models import token_ids

from slicegpt.ops.panels import PanelWeight
from slicegpt.runtime import Runtime, weight_memory
from slicegpt.runtime.weight_memory import LINE, WeightMemory


def test_copies_lie_one_behind_the_other_and_outlive_the_memory():
    memory = WeightMemory()
    first, second = torch.randn(30, 7), torch.randn(9, 40).bfloat16().mT
    copies = [memory.copy(first), memory.copy(second)]
    panel = panels(random_codes(20, 64, 4, 2, True)).with_rest(torch.ones(3, 64), 0)
    copied = memory.copy(panel)
    del memory
    gc.collect()
    assert torch.equal(copies[0], first)
    assert torch.equal(copies[1], second)
    assert copies[1].is_contiguous()
    if weight_memory.HUGE_PAGES is not None:
        assert copies[1].data_ptr() == copies[0].data_ptr() + -(-first.nbytes // LINE) * LINE
        assert copied.codes.data_ptr() > copies[1].data_ptr()
    assert isinstance(copied, PanelWeight)
    assert torch.equal(copied.double(), panel.double())


def test_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(weight_memory, "CHUNK", 1024)
    memory = WeightMemory()
    weights = [torch.randn(count) for count in (100, 200, 2000, 0, 50)]
    assert all(torch.equal(memory.copy(weight), weight) for weight in weights)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_a_released_model_gives_its_head_as_well(case):
    plain, ids = network(case, "compact", torch.float32), token_ids()
    expected = Runtime(plain).logits(ids)
    runtime = Runtime(plain, release=True)
    assert torch.equal(runtime.logits(ids), expected)
    assert plain.lm_head.weight.is_meta
    packed = runtime.executor.packed
    assert (packed.head.weight.data_ptr() == packed.embedding.data_ptr()) == (case == "qwen3-tied")
