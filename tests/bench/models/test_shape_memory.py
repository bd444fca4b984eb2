"""`--shape` with slicing builds the sliced network alone: the dense one, which may not fit, is never in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from slicegpt.bench.models import architectures as models
from slicegpt.bench.models.networks import choose_networks
from slicegpt.conversion.plan import Shape
from slicegpt.modeling.sizes import skeleton

CPU = torch.device("cpu")
NAME = "llama-of-this-test"
# Wide enough that no table of random values is as large as a weight.
CONFIG = LlamaConfig(
    hidden_size=1024,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=2816,
    vocab_size=64,
)


class Created(TorchDispatchMode):
    """Shapes of all tensors that come into being with memory behind them."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.shapes.add(tuple(tensor.shape))
        return result


def weight_shapes(config) -> set[tuple[int, ...]]:
    return {tuple(weight.shape) for weight in skeleton(config).parameters() if weight.dim() == 2}


@pytest.mark.parametrize("keeps_plain", [True, False])
def test_dense_model_is_never_built(keeps_plain, monkeypatch):
    monkeypatch.setitem(models.MODELS, NAME, CONFIG)
    models.fields_of.cache_clear()
    try:
        dense_config = models.sliced_config(NAME, 0)
        with Created() as created:
            (network,) = choose_networks([], NAME, [0.25], [torch.float32], CPU, Shape(round_to=64))
            network.keeps_plain = keeps_plain
            parameters = sum(weight.numel() for weight in network.canonical().parameters())
            network.runtime()
    finally:
        models.fields_of.cache_clear()
    dense = weight_shapes(dense_config) - weight_shapes(network.config)
    assert {(1024, 1024), (512, 1024), (2816, 1024)} <= dense
    assert not dense & created.shapes
    assert weight_shapes(network.config) <= created.shapes  # the weights were seen
    assert parameters == network.parameters < 0.9 * dense_config.source_parameters
