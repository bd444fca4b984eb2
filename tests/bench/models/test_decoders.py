"""Decoders: the bytes that they read, and what `generate()` says in pieces."""

import pytest
import torch

from slicegpt.bench.commands.predict import cost_of
from slicegpt.bench.models.architectures import sliced_config
from slicegpt.bench.models.decoders import GenerateDecoder, bytes_read
from slicegpt.modeling.sizes import skeleton


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_bytes_read_are_those_of_the_prediction(fraction):
    config = sliced_config("smollm2-135m", fraction, round_to=8)
    model = skeleton(config).to(torch.float16)
    model.tie_weights()
    # The prediction leaves out what is not a layer or the head: the last norm and a tied model's projection.
    rest = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(("model.norm", "model.embed_proj"))
    )
    assert bytes_read(model) == 2 * (cost_of(config).read_weights + rest)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_series_of_generate_calls_are_one_generation(tiny_networks, cache):
    """In pieces and with every token watched, `generate()` says what it says in one call."""
    (network,) = tiny_networks((0.0,))
    model, ids = network.huggingface(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    decoder, calls, said = GenerateDecoder(model, 2, 16, cache=cache), [], []
    decoder.prompt(ids)
    said.append(decoder.tokens)

    def after() -> None:
        calls.append("after")
        said.append(decoder.tokens)

    for _ in range(2):
        decoder.steps(3, after, before=lambda: calls.append("before"))
    decoder.step()
    said.append(decoder.tokens)
    assert calls == ["before", "after"] * 6
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)[:, 3:]
    assert torch.equal(torch.cat(said, dim=1), expected[:, [0, 2, 3, 4, 6, 7, 8, 9]])
