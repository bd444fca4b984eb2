"""What the refit of experts is compared with: the same slice with the experts' own weights."""

import json

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import tiny_model

from slicegpt.bench.commands.refit_experts import OWN, difference, main, penalised, size_of
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, slice_model


def distances(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of each column of `some` how far the nearest one of `others` is."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(some.mT, others.mT, compute_mode=exact).amin(dim=1)


def down(model, layer: int) -> torch.Tensor:
    return model.state_dict()[f"model.layers.{layer}.mlp.experts.down_proj"]


@torch.no_grad()
def test_own_weights_are_those_of_the_neurons_that_the_refit_keeps():
    """At full width nothing is rotated: every column of an expert's output weights is one of its own, and its neuron's
    rows of the gate are the ones that are there with the refit as well."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    config = size_of(canonical_fields(model), 0.8)
    options = SlicingOptions(dtype=torch.float64, ridge=0.3, allocate="uniform", neuron_multiple=1)
    sliced = {}
    for factor in (OWN, 1.0, 1e9):
        with penalised(factor):
            sliced[factor] = slice_model(model, config, batches(), options)[0]
    plain = slice_model(model, config, batches(), options)[0]
    assert torch.equal(down(sliced[1.0], 0), down(plain, 0))
    dense, own, fitted = down(model, 0), down(sliced[OWN], 0), down(sliced[1.0], 0)
    for expert in range(4):
        assert distances(own[expert], dense[expert]).max() == 0
        assert distances(fitted[expert], dense[expert]).max() > 1e-3
    gates = (network.state_dict()["model.layers.0.mlp.experts.gate_up_proj"] for network in sliced.values())
    first, second, _ = gates
    assert torch.equal(first, second)
    # λ without bounds: the weights of a ridge regression differ from their prior by 1 / λ.
    assert distances(down(sliced[1e9], 0)[0], dense[0]).max() < 1e-6


def test_differences_are_paired():
    mean, error = difference([3.0, 5.0, 1.5], [2.0, 4.0, 1.0])
    assert mean == pytest.approx(2.5 / 3)
    assert error == pytest.approx((0.25 / 3) ** 0.5 / 3**0.5)  # 1, 1, 0.5 with a variance of 1/12


def test_the_command_writes_a_row_for_every_choice(tmp_path, tiny_tokenizer, capsys):
    folder, text, file = tmp_path / "model", tmp_path / "text.txt", tmp_path / "rows.json"
    tiny_model("mixtral", torch.float32, vocab_size=512).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    text.write_text("the cat sat on the mat and the dog ran away from it all " * 200, encoding="utf-8")
    arguments = [str(folder), "--calibration", str(text), "--held-out", str(text), "--keep", "0.8"]
    main([*arguments, "--samples", "2", "--windows", "4", "--json", str(file)])
    result = json.loads(file.read_text())
    assert [row["penalty"] for row in result["rows"]] == ["own weights", 1.0]
    assert result["rows"][0]["against own weights"] == 0
    assert "router shifted by one" in capsys.readouterr().out
