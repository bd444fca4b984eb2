"""Networks of models and folders."""

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.bench.models.networks import choose_networks
from slicegpt.conversion.plan import Shape

CPU = torch.device("cpu")


def test_labels_tell_models_apart(tiny_folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(tiny_folder)
    names = [str(tiny_folder), str(other)]
    networks = choose_networks(names, None, [0.0, 0.5], [None], CPU, Shape(round_to=8))
    assert [network.label for network in networks] == [
        "tiny-llama dense",
        "tiny-llama sliced 50 %",
        "other dense",
        "other sliced 50 %",
    ]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_folder_of_a_dense_model_has_every_size(family, tmp_path):
    """Also of a family whose checkpoint's form is rewritten with computed numbers."""
    tiny_model(family, torch.float32).save_pretrained(tmp_path)
    dense, sliced = choose_networks([str(tmp_path)], None, [0.0, 0.5], [None], CPU, Shape(round_to=8))
    assert dense.is_dense
    assert not sliced.is_dense
    assert sliced.slice == 0.5
    assert sliced.parameters < dense.parameters
