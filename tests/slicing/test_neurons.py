"""Deleting MLP neurons: the choice against brute force, the driver against a dense model with its neurons masked."""

from itertools import combinations

import pytest
import torch
from support.neuron_choice import objective
from support.ridge_regression import in_columns
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.conversion.plan import NEURONS_TO_COLUMNS, Shape, constant_widths, plan
from slicegpt.conversion.size_plan import plan_for_parameters
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import decoder_parameters, stored_parameters
from slicegpt.runtime import Runtime
from slicegpt.slicing import Objective, SlicingOptions, neurons, slice_model
from slicegpt.slicing.neurons import choose_neurons

CASES = ["llama", "llama-tied", "llama-biased", "mistral-window", "qwen3-tied", "opt", "phi"]


def problem(inputs: int = 10, outputs: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """H [K, K] of correlated columns, and B [K, D]."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(50, inputs, generator=generator).double()
    activations = activations @ torch.randn(inputs, inputs, generator=generator).double()
    system = activations.mT @ activations + torch.eye(inputs).double()
    return system, activations.mT @ torch.randn(50, outputs, generator=generator).double()


def choose(system: torch.Tensor, right: torch.Tensor, group: slice, count: int) -> torch.Tensor:
    """`choose_neurons` from copies, which it overwrites."""
    return choose_neurons(equations(system, right), len(system), group, count)


def equations(system: torch.Tensor, right: torch.Tensor):
    return lambda: (in_columns(system), in_columns(right))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group", [slice(0, 10), slice(3, 9)], ids=["all", "some"])
def test_one_a_round_is_the_greedy_choice(seed, group, monkeypatch):
    """Every deletion is the one that raises the objective least, found by solving all that remain anew."""
    monkeypatch.setattr(neurons, "ROUNDS", 10**6)
    system, right = problem(seed=seed)
    kept = list(range(10))
    for count in range(group.stop - group.start - 1, 1, -1):
        inside = [row for row in kept if group.start <= row < group.stop]
        choices = {row: objective(system, right, [other for other in kept if other != row]) for row in inside}
        kept.remove(min(choices, key=choices.get))
        assert choose(system, right, group, count).tolist() == kept


def test_several_a_round_are_near_the_best_of_all():
    """Against every pair and triple that could go: within twice the least rise, and well below the mean."""
    for seed in range(5):
        system, right = problem(seed=seed)
        whole = objective(system, right, range(10))
        for removed in (2, 3):
            rises = torch.tensor(
                [
                    objective(system, right, [row for row in range(10) if row not in gone]) - whole
                    for gone in combinations(range(10), removed)
                ]
            )
            chosen = choose(system, right, slice(0, 10), 10 - removed)
            rise = objective(system, right, chosen) - whole
            assert rises.min() - 1e-9 <= rise <= 2 * rises.min()
            assert rise < 0.7 * rises.mean()


def test_nothing_to_delete():
    system, right = problem()
    assert choose(system, right, slice(2, 8), 6).tolist() == list(range(10))


def test_rounds_lose_little():
    """32 rounds of many neurons against one at a time, on columns as correlated as an MLP's: 1 % of the rise."""
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(600, 40, generator=generator).double()
    activations = torch.relu(activations @ torch.randn(40, 200, generator=generator).double())
    system = activations.mT @ activations
    system.diagonal().add_(0.1 * system.diagonal().mean())
    right = system @ torch.randn(200, 16, generator=generator).double()
    whole = objective(system, right, range(200))
    rises = []
    for rounds in (32, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neurons, "ROUNDS", rounds)
            chosen = choose(system, right, slice(0, 200), 100)
        rises.append(objective(system, right, chosen) - whole)
    assert rises[0] < 1.01 * rises[1]


# --- the driver -------------------------------------------------------------------------------------------------


def sliced(model, width: int, shape: Shape, calibration=None, objective=None, **options):
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, width), shape)
    calibration = calibration or batches(8)
    options = SlicingOptions(**{"dtype": torch.float64, "fitted": 1.0} | options)
    return slice_model(model, config, calibration, options, objective=objective)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shortcut", ["compact", "dense"])
def test_every_family(case, shortcut, tmp_path):
    """Fewer rows and columns are stored, the folder reloads, and the runtime packs what remains."""
    model, ids = tiny_model(case), token_ids()
    network, report = sliced(model, 40, Shape(shortcut, round_to=4, neurons=0.2))
    assert network.config.intermediate_size == 64
    assert network.config.dense_intermediate_size == 80
    for layer in network.model.layers:
        assert layer.mlp.up_proj.weight.shape[0] == layer.mlp.down_proj.weight.shape[1] == 64
    logits = network(ids).logits
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(ids).logits, logits)
    assert relative_error(Runtime(network).logits(ids), logits) < 1e-10
    assert len(report.refit) == network.config.num_blocks


@torch.no_grad()
@pytest.mark.parametrize("stored", [0.1, 3.0])
def test_the_remaining_neurons_are_fitted_to_the_dense_stream(stored):
    """At full width, the first MLP: its neurons are some of the dense ones, and its output weights the ridge
    regression of the dense block's output on these, from Hugging Face's own activations. At the λ that is stored,
    while the tokens went on, and the neurons were chosen, at 0.1."""
    candidates = Objective(ridges=tuple(sorted({0.1, stored})), unjudged_ridge=stored)
    model, calibration = tiny_model("llama"), batches(8)
    network, report = sliced(model, 48, Shape(round_to=4, neurons=0.25), calibration, candidates)
    assert {entry["ridge"] for entry in report.refit} == {stored}
    mlp, shorter = model.model.layers[0].mlp, network.model.layers[0].mlp
    folded = mlp.up_proj.weight * model.model.layers[0].post_attention_layernorm.weight
    matches = (shorter.up_proj.weight[:, None] - folded).abs().amax(dim=2) < 1e-12
    assert matches.sum(dim=1).eq(1).all()
    kept = matches.int().argmax(dim=1)
    assert kept.diff().gt(0).all()

    seen, streams = [], []
    handles = [
        mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0])),
        model.model.layers[1].register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0])),
    ]
    for batch in calibration:
        model(batch.input_ids)
    for handle in handles:
        handle.remove()
    activations, after = torch.cat(seen).flatten(0, 1), torch.cat(streams).flatten(0, 1)
    # Tokens count by the inverse of the stream's norm before the block or after it, the larger one.
    before = after - mlp.down_proj(activations)
    squares = torch.maximum(*(stream.square().sum(dim=1, keepdim=True) for stream in (before, after)))
    activations = activations * (squares + 48 * model.config.rms_norm_eps) ** -0.25
    penalty = stored * activations.square().sum(dim=0).mean()
    weight = mlp.down_proj.weight.mT
    left = torch.cat((activations[:, kept], penalty.sqrt() * torch.eye(len(kept)).double()))
    right = torch.cat((activations @ weight, penalty.sqrt() * weight[kept]))
    expected = torch.linalg.lstsq(left, right, driver="gelsd").solution
    # float64 all through; conditions of some 1e3 on either side.
    assert relative_error(shorter.down_proj.weight.mT, expected) < 1e-10


@torch.no_grad()
def test_better_than_deleting_the_smallest_weights():
    """Closer to the dense model than the same number of neurons deleted by magnitude, without a fit."""
    model, calibration = tiny_model("llama"), batches(16)
    ids = torch.cat([batch.input_ids for batch in calibration])
    dense = model(ids).logits
    network, _ = sliced(model, 48, Shape(round_to=4, neurons=0.25), calibration)
    for layer in model.model.layers:
        down = layer.mlp.down_proj.weight
        gone = (down.norm(dim=0) * layer.mlp.up_proj.weight.norm(dim=1)).argsort()[:20]
        down[:, gone] = 0
    assert relative_error(network(ids).logits, dense) < 0.8 * relative_error(model(ids).logits, dense)


def test_deleting_neurons_needs_the_refit():
    with pytest.raises(SliceGPTError, match=r"neurons: .* decided by the refit, which is off"):
        sliced(tiny_model("llama"), 40, Shape(round_to=4, neurons=0.2), refit=False)


# --- planning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "neurons", "remaining"),
    [
        (48, 0.0, 80),
        (36, 0.0, 80),
        (36, 0.25, 60),
        (36, 0.21, 60),  # 63.2, down to a multiple of 4
        (36, 0.99, 4),
        (48, None, 80),
        (46, None, int(80 * (1 - NEURONS_TO_COLUMNS / 24)) // 4 * 4),
        (24, None, 4),  # never nothing
    ],
)
def test_remaining_neurons(width, neurons, remaining):
    fields = canonical_fields(tiny_model("llama"))
    config = plan(fields, constant_widths(fields, width), Shape(round_to=4, neurons=neurons))
    assert (config.intermediate_size, config.dense_intermediate_size) == (remaining, 80)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(SliceGPTError, match=r"neurons: must lie in \[0, 1\), got"):
        Shape(neurons=fraction)


@pytest.mark.parametrize("count", [stored_parameters, decoder_parameters])
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_a_size_is_reached_by_both(case, count):
    """Not one more multiple of neurons fits, nor the next width with its share of neurons."""
    fields = canonical_fields(tiny_model(case))
    whole = count(plan(fields, constant_widths(fields, 48)))
    for fraction in (0.7, 0.8, 0.9, 0.97):
        config = plan_for_parameters(fields, int(fraction * whole), Shape(round_to=4, neurons=None), count)
        width, remaining = config.boundary_widths[0], config.intermediate_size
        assert count(config) <= fraction * whole
        if remaining < 80:
            more = plan(fields, config.boundary_widths, Shape(round_to=4), neurons=min(80, remaining + 4))
            assert count(more) > fraction * whole
        wider = plan(fields, constant_widths(fields, width + 4), Shape(round_to=4, neurons=None))
        assert count(wider) > fraction * whole


@pytest.mark.parametrize("group", [slice(0, 4), slice(2, 6)], ids=["all there is", "beside others"])
def test_neurons_that_never_fire_go_for_nothing(group):
    """A layer whose neurons are all silent has an empty system: no prior either, for it is in proportion to them."""
    size = group.stop
    system, right = torch.zeros(size, size).double(), torch.zeros(size, 3).double()
    others = slice(0, group.start)
    system[others, others] = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()[others, others]
    right[others] = 1.0
    rises = [rise.item() for _, rise in neurons.deletions(equations(system, right), group, [1, 2])]
    assert rises == [0.0, 0.0]
    assert len(choose(system, right, group, 1)) == size - 3


def test_a_dead_mlp_is_sliced_to_any_size():
    """All of it goes but what rounding keeps, and the other layers' neurons stay."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    fields = canonical_fields(model)
    config = plan_for_parameters(
        fields, int(0.8 * fields["source_parameters"]), Shape(round_to=4, neurons=None)
    )
    options = SlicingOptions(dtype=torch.float64, ridge=0.1, neuron_multiple=4)
    sliced, _ = slice_model(model, config, batches(), options)
    kept = sliced.config.neurons
    assert kept[1] == min(kept) < 80
    assert sliced(token_ids()).logits.isfinite().all()
