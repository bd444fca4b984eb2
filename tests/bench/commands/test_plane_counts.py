"""How many residue planes a covariance needs, against exact integers."""

import math

import pytest
import torch

from slicegpt.bench.commands.plane_counts import (
    MODULI,
    PRODUCT_BITS,
    WINDOW,
    collect,
    plane_counts,
    significand_bits,
)


def test_bits_of_a_number():
    X = torch.tensor([1.0, -3.0, 0.5, 40.0, 2.0**-130, 1 + 2.0**-20])
    top, low = significand_bits(X)
    assert top.tolist() == [0, 1, -1, 5, -130, 0]
    assert low.tolist() == [0, 0, -1, 3, -130, -20]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["gaussian", "heavy"])
def test_the_moduli_hold_every_product(dtype, spread):
    """The largest integer of every tile fits, and one modulus fewer would not hold the bound of its norms."""
    generator = torch.Generator().manual_seed(0)
    X = (
        torch.randn(300, 256, generator=generator)
        * (spread * torch.randn(300, 256, generator=generator)).exp()
    )
    X = X.to(dtype)
    counts, unfit = plane_counts(X)
    assert unfit == 0
    _, low = significand_bits(torch.where(X == 0, 1.0, X))
    integers = X.double() / low.amin(0).exp2()
    assert torch.equal(integers, integers.round())
    product = integers.T @ integers
    tiles = ((slice(0, 128),) * 2, (slice(0, 128), slice(128, 256)), (slice(128, 256),) * 2)
    for count, (rows, columns) in zip(counts.tolist(), tiles, strict=True):
        bits = float(product[rows, columns].abs().max().log2()) + 1
        assert bits < math.log2(math.prod(MODULI[:count]))
        bound = float(
            integers[:, rows].norm(dim=0).max().log2() + integers[:, columns].norm(dim=0).max().log2()
        )
        assert bound + 1.03 > PRODUCT_BITS[count - 2]


def test_tokens_that_do_not_fit_are_handed_over():
    X = torch.ones(10, 4)
    X[3, 1] = 2.0**-WINDOW
    counts, unfit = plane_counts(X)
    assert unfit == 1
    # Ten ones a column: 3.4 bits and the sign.
    assert counts.tolist() == [1]
    assert plane_counts(torch.zeros(4, 4))[0].tolist() == [1]


def test_every_signal_is_collected(tiny_networks):
    """Two a layer of the stream, one of each output projection; in the order of the layers."""
    model = tiny_networks((0.0,))[0].huggingface()
    found = collect(model, torch.arange(12) % 40, seqlen=6)
    layers = model.config.num_hidden_layers
    assert {kind: len(each) for kind, each in found.items()} == {
        "stream": 2 * layers, "attention output": layers, "MLP neurons": layers,
    }  # fmt: skip
    first = model.get_input_embeddings()(torch.arange(12) % 40)
    torch.testing.assert_close(found["stream"][0], first)
    assert found["MLP neurons"][0].shape == (12, model.config.intermediate_size)
