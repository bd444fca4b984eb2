"""Neurons shared out among the layers: costs against regressions, shares against every choice, the sizes stored."""

from itertools import product

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from support.neuron_choice import objective
from support.objectives import Unweighted
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields, checkpoint_of
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import describe_neurons, stored_parameters
from slicegpt.progress import Progress
from slicegpt.recipe import ALLOCATIONS, UNIFORM
from slicegpt.runtime import Runtime
from slicegpt.slicing import Objective, SlicingOptions, slice_model
from slicegpt.slicing.allocation import (
    deletion_costs,
    fewest_neurons,
    neuron_parameters,
    neuron_structures,
    share_out,
)

CASES = ["llama", "llama-tied", "llama-biased", "mistral-window", "qwen3-tied", "opt", "phi"]


def planned(case: str, width: int = 40, neurons: float = 0.3) -> SlicedConfig:
    fields = canonical_fields(tiny_model(case))
    return plan(fields, constant_widths(fields, width), Shape(round_to=4, neurons=neurons))


def options(**changed) -> SlicingOptions:
    return SlicingOptions(**{"dtype": torch.float64, "neuron_multiple": 4} | changed)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "judge"), [("llama", Objective()), ("opt", Objective()), ("llama", Unweighted())]
)
def test_costs_are_those_of_the_regressions(case, judge):
    """The first layer's curve: at every point what the ridge regression of the dense block's output loses with the
    remaining neurons, from Hugging Face's own activations. OPT's has biases, whose intercept is fitted along."""
    model, config, calibration = tiny_model(case), planned(case), batches(8)
    silent = Progress(quiet=True)
    curve = deletion_costs(checkpoint_of(model), config, calibration, options(), judge, 0.1, silent).curves[0]
    assert curve[0] == (80, 0.0)
    assert curve[-1][0] == fewest_neurons(config, 4) == 20

    layer = model.model.layers[0] if case == "llama" else model.model.decoder.layers[0]
    writer = layer.mlp.down_proj if case == "llama" else layer.fc2
    following = model.model.layers[1] if case == "llama" else model.model.decoder.layers[1]
    seen, streams = [], []
    handles = [
        writer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output))),
        following.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0])),
    ]
    for batch in calibration:
        model(batch.input_ids)
    for handle in handles:
        handle.remove()
    activations, written = (
        torch.cat(parts).reshape(-1, parts[0].shape[-1]) for parts in zip(*seen, strict=True)
    )
    after = torch.cat(streams).reshape(len(written), -1)
    if case == "opt":  # the canonical stream has no mean
        written, after = (x - x.mean(dim=1, keepdim=True) for x in (written, after))
    before = after - written
    eps = model.config.rms_norm_eps if case == "llama" else 1e-5
    squares = torch.maximum(before.square().sum(dim=1), after.square().sum(dim=1))
    weights = (squares + 48 * eps).rsqrt()
    if isinstance(judge, Unweighted):
        weights = torch.ones_like(weights)
    if case == "opt":
        activations = activations - (weights @ activations) / weights.sum()
        written = written - (weights @ written) / weights.sum()
    system = activations.mT @ (weights[:, None] * activations)
    penalty = 0.1 * system.diagonal().mean()
    dense = writer.weight.mT
    if case == "opt":
        dense = dense - dense.mean(dim=1, keepdim=True)
    right = activations.mT @ (weights[:, None] * written) + penalty * dense
    system.diagonal().add_(penalty)
    whole, kept = objective(system, right, range(80)), list(range(80))
    for remaining, rise in curve[1:]:
        # Of those that remain, the neurons that cost least one by one go together.
        costs = {row: objective(system, right, [other for other in kept if other != row]) for row in kept}
        kept = sorted(sorted(kept, key=costs.get)[len(kept) - remaining :])
        # Both solve systems whose condition is some 1e4 in float64.
        assert rise == pytest.approx(objective(system, right, kept) - whole, rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_shares_are_the_best_of_all(case, seed):
    """Convex curves: no other choice that stores as few parameters has a lower sum of rises."""
    config, generator = planned(case), torch.Generator().manual_seed(seed)
    config.num_hidden_layers = 3
    parameters = neuron_parameters(config)
    slopes = (torch.rand(3, 1, generator=generator) + 0.1) * torch.rand(3, 16, generator=generator).cumsum(1)
    curves = [[(80 - 4 * step, float(slope[:step].sum())) for step in range(16)] for slope in slopes.double()]
    chosen = share_out(neuron_structures(curves, config, 4), config)
    budget = config.intermediate_size * sum(parameters)

    def rise(neurons) -> float:
        return sum(dict(curve)[count] for curve, count in zip(curves, neurons, strict=True))

    def stored(neurons) -> int:
        return sum(count * each for count, each in zip(neurons, parameters, strict=True))

    assert all(count % 4 == 0 and count >= fewest_neurons(config, 4) for count in chosen)
    assert stored(chosen) <= budget
    best = min(
        rise(neurons) for neurons in product(range(20, 81, 4), repeat=3) if stored(neurons) <= stored(chosen)
    )
    assert rise(chosen) == pytest.approx(best)


def test_a_cheap_step_behind_a_dear_one():
    """Both are taken together where they are cheap together, and neither is where they are not."""
    config = planned("llama")
    other = [(80, 0.0), (20, 15.0)]
    for rise, all_of_them in ((9.0, True), (30.0, False)):
        stepped = [(80, 0.0), (76, rise), (20, rise + 0.1)]
        neurons = share_out(neuron_structures([stepped, other, other], config, 4), config)
        assert neurons[0] == (20 if all_of_them else 80)
        gone = 3 * (80 - config.intermediate_size)
        assert gone <= 3 * 80 - sum(neurons) <= gone + 4  # one step more: the last layer's neurons store more


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_every_family(case, tmp_path):
    """At most as many parameters as planned, other numbers in every layer; reloads, and the runtime packs it."""
    model, config, ids = tiny_model(case), planned(case), token_ids()
    network, _ = slice_model(model, config, batches(8), options())
    neurons = network.config.neurons
    assert len(set(neurons)) > 1
    assert neurons == [layer.mlp.down_proj.in_features for layer in network.model.layers]
    one = max(neuron_parameters(config))
    assert 0 <= stored_parameters(config) - stored_parameters(network.config) < 4 * one
    logits = network(ids).logits
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(ids).logits, logits)
    # float64 all through; the same products in another order.
    assert relative_error(Runtime(network).logits(ids), logits) < 1e-10


@torch.no_grad()
def test_layers_that_do_little_give_more():
    """Closer to the dense model than the same number everywhere, where one layer's MLP hardly writes anything."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.mul_(0.02)
    config, calibration = planned("llama", 48), batches(16)
    ids = torch.cat([batch.input_ids for batch in calibration])
    dense = model(ids).logits
    errors = {}
    for allocate in ALLOCATIONS:
        network, _ = slice_model(model, config, calibration, options(allocate=allocate))
        errors[allocate] = relative_error(network(ids).logits, dense)
        if allocate != UNIFORM:
            assert network.config.neurons[1] == fewest_neurons(config, 4)
        else:
            assert network.config.neurons == [config.intermediate_size] * 3
    assert max(errors["prices"], errors["objective"]) < 0.8 * errors["uniform"]


def test_a_config_must_name_every_layer():
    config = planned("llama").to_dict()
    for neurons in ([80, 80], [80, 80, -1]):
        with pytest.raises(
            StrictDataclassClassValidationError,
            match=r"layer_neurons must hold 3 numbers of at least 0, got \[80, 80",
        ):
            SlicedConfig.from_dict(config | {"layer_neurons": neurons})
    with pytest.raises(StrictDataclassClassValidationError, match="intermediate_size must lie in"):
        SlicedConfig.from_dict(config | {"layer_neurons": [80, 81, 80]})


def test_bad_multiple():
    with pytest.raises(SliceGPTError, match="neuron_multiple: must be at least 1, got 0"):
        options(neuron_multiple=0)


def test_how_neurons_are_described():
    assert describe_neurons(64) == describe_neurons([64, 64]) == "64"
    assert describe_neurons([80, 40, 63]) == "40 to 80, 61 on average"


@torch.no_grad()
def test_an_overflow_is_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    message = r"activations: NaN or infinity in the stream after layer 1 \(mlp\)"
    with pytest.raises(SliceGPTError, match=message):
        deletion_costs(
            checkpoint_of(model),
            planned("llama"),
            batches(8),
            options(),
            Objective(),
            0.1,
            Progress(quiet=True),
        )
