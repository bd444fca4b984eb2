"""A sliced model on a device without room for all of it: the same logits, and everything back in its place."""

import copy

import pytest
import torch
from support.tiny_models import tiny_model, token_ids

from slicegpt.conversion.plan import constant_widths, plan
from slicegpt.families import canonical_fields
from slicegpt.hardware import offload
from slicegpt.hardware.offload import OffloadedLayer, layer_by_layer
from slicegpt.slicing import SlicingOptions, slice_model

CPU = torch.device("cpu")


@pytest.fixture(params=["llama-tied", "opt", "phi"])
def model(request):
    dense = tiny_model(request.param)
    fields = canonical_fields(dense)
    rotated = plan(fields, constant_widths(fields, fields["dense_hidden_size"]))
    return slice_model(dense, rotated, (), SlicingOptions(torch.float64))[0]


@torch.no_grad()
@pytest.mark.parametrize("fits", [True, False])
def test_the_same_logits(model, fits, monkeypatch):
    monkeypatch.setattr(offload, "fits_on", lambda model, device: fits)
    expected, layers = model(token_ids()).logits, model.model.layers
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with layer_by_layer(model, CPU):
        assert isinstance(model.model.layers[0], OffloadedLayer) != fits
        assert torch.equal(model(token_ids()).logits, expected)
    assert model.model.layers is layers
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_an_error_leaves_the_model_as_it_was(model, monkeypatch):
    monkeypatch.setattr(offload, "fits_on", lambda model, device: False)
    layers = model.model.layers
    with pytest.raises(RuntimeError), layer_by_layer(model, CPU):
        raise RuntimeError
    assert model.model.layers is layers


@torch.no_grad()
def test_a_layer_runs_where_it_is_told_and_stays_where_it_is():
    """The device of no data: what comes out has a shape there, and the weights are untouched."""
    meta, layer = torch.device("meta"), torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    weight = layer[0].weight.clone()
    out = OffloadedLayer(layer.eval(), meta)(torch.empty(2, 3, device=meta))
    assert (out.device.type, out.shape) == ("meta", (2, 5))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    assert torch.equal(layer[0].weight, weight)


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("fits", [True, False])
def test_on_a_gpu(model, fits, monkeypatch):
    monkeypatch.setattr(offload, "fits_on", lambda model, device: fits)
    # On the same device: sines and cosines are float32, and their last bits differ between devices.
    expected = copy.deepcopy(model).cuda()(token_ids().cuda()).logits.cpu()
    with layer_by_layer(model, torch.device("cuda")):
        logits = model(token_ids().to("cuda")).logits
        resident = {parameter.device.type for parameter in model.model.layers.parameters()}
    assert resident == {"cuda" if fits else "cpu"}
    # float64 sums of at most 96 terms in another order, a few layers.
    assert (logits.cpu() - expected).abs().max() < 1e-11 * expected.abs().max()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
