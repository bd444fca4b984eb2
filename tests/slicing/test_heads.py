"""Deleting key/value groups and whole parts: the choice against brute force, the driver against what costs nothing."""

from itertools import combinations

import pytest
import torch
from support.neuron_choice import objective
from support.ridge_regression import in_columns
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.slicing.deletion import Deletion
from slicegpt.slicing.heads import group_deletions, groups_that_stay, head_deletions

GROUPS = [slice(3 * group, 3 * group + 3) for group in range(4)]  # and two rows that are no group's


def problem(seed: int, size: int = 14, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """H [K, K] of correlated columns, and B [K, D]."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(60, size, generator=generator).double()
    activations = activations @ torch.randn(size, size, generator=generator).double()
    system = activations.mT @ activations + torch.eye(size).double()
    return system, activations.mT @ torch.randn(60, outputs, generator=generator).double()


def rows_of(groups, size: int = 14) -> list[int]:
    """Rows of these groups, and those of none."""
    return [row for row in range(size) if row >= 12 or row // 3 in groups]


@pytest.mark.parametrize("seed", range(4))
def test_each_deletion_is_the_cheapest_and_exact(seed):
    """Every group that goes is the one without which the best of all solutions, found anew, is worst off least; the
    rises add up to its objective, and what remains is its solution."""
    system, right = problem(seed)
    deletion = Deletion(lambda: (in_columns(system), in_columns(right)))
    staying, before = [0, 1, 2, 3], objective(system, right, range(14))
    for rise in group_deletions(deletion, GROUPS, 0):
        choices = {
            gone: objective(system, right, rows_of([other for other in staying if other != gone]))
            for gone in staying
        }
        staying.remove(min(choices, key=choices.get))
        after = objective(system, right, kept := rows_of(staying))
        # K³ roundings of float64 in a system of condition 1e4: far below 1e-9 of the objective.
        assert rise.item() == pytest.approx(after - before, rel=1e-9)
        assert groups_that_stay(deletion, GROUPS).tolist() == staying
        assert deletion.kept().tolist() == kept
        assert (
            relative_error(deletion.weight[kept], torch.linalg.solve(system[kept][:, kept], right[kept]))
            < 1e-9
        )
        before = after
    assert staying == []


def test_query_heads_of_what_stays():
    """Behind the groups, one head at a time, the cheapest of groups that are not as small yet: against solving anew."""
    groups = [slice(0, 6), slice(6, 12)]
    for seed in range(4):
        system, right = problem(seed)
        deletion = Deletion(lambda: (in_columns(system), in_columns(right)))  # noqa: B023
        kept = set(range(14))
        for rise in head_deletions(deletion, groups, 2, 1):
            before = objective(system, right, sorted(kept))
            sizes = [len(kept & set(range(group.start, group.stop))) for group in groups]
            choices = {
                row: objective(system, right, sorted(kept - {row, row + 1}))
                for group, size in zip(groups, sizes, strict=True)
                for row in range(group.start, group.stop, 2)
                if size > 2 and row in kept
            }
            gone = min(choices, key=choices.get)
            kept -= {gone, gone + 1}
            assert rise.item() == pytest.approx(choices[gone] - before, rel=1e-9)
            assert deletion.kept().tolist() == sorted(kept)
        assert [len(kept & set(range(group.start, group.stop))) for group in groups] == [2, 2]
        assert groups_that_stay(deletion, groups).tolist() == [0, 1]


def test_near_the_best_of_all():
    """Two of four groups, against every pair: within 1.5 times the least rise."""
    for seed in range(6):
        system, right = problem(seed)
        whole = objective(system, right, range(14))
        rises = [objective(system, right, rows_of(pair)) - whole for pair in combinations(range(4), 2)]
        deletion = Deletion(lambda: (in_columns(system), in_columns(right)))  # noqa: B023
        steps = [more.item() for more in group_deletions(deletion, GROUPS, 0)]
        curve = {len(GROUPS) - gone: sum(steps[:gone]) for gone in range(len(steps) + 1)}
        assert min(rises) - 1e-9 <= curve[2] <= 1.5 * min(rises)
        assert list(curve) == [4, 3, 2, 1, 0]


# --- the driver -------------------------------------------------------------------------------------------------


def sliced(model, width=48, neurons=None, shape=None, calibration=None, **options):
    fields = canonical_fields(model)
    shape = shape or Shape(round_to=4)
    config = plan(fields, constant_widths(fields, width), shape, neurons)
    options = {"dtype": torch.float64, "neuron_multiple": 4} | options
    return slice_model(model, config, calibration or batches(), SlicingOptions(**options))


def head_columns(model, layer: int, groups: list[int]) -> tuple[torch.Tensor, slice | list[int]]:
    """The output projection of a dense layer's attention, and the columns of these key/value groups."""
    fields = canonical_fields(model)
    heads, size = fields["num_attention_heads"], fields.get("head_dim") or 48 // 4
    shared = heads // (fields.get("num_key_value_heads") or heads) * size
    columns = [column for group in groups for column in range(shared * group, shared * (group + 1))]
    attention = model.get_decoder().layers[layer].self_attn
    return getattr(attention, "o_proj", None) or getattr(
        attention, "dense", None
    ) or attention.out_proj, columns


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-biased", "qwen3-tied", "opt", "phi", "gemma3"])
def test_what_writes_nothing_goes_first_and_for_nothing(case):
    """A group whose columns of the output projection are 0, all of a layer's groups, and all of a layer's neurons.
    Grouped heads and one key head each, biases, q/k norms, learned positions, parallel blocks, norms behind blocks."""
    model, ids = tiny_model(case), token_ids()
    layers = model.get_decoder().layers
    gone = {0: [1], 1: [0, 1, 2, 3] if case in ("opt", "phi") else [0, 1]}
    if case == "phi":
        gone[1] = [0, 1]
    for layer, groups in gone.items():
        writer, columns = head_columns(model, layer, groups)
        writer.weight[:, columns] = 0
    down = getattr(layers[2], "mlp", layers[2])
    down = getattr(down, "down_proj", None) or getattr(down, "fc2", None)
    down.weight.zero_()
    all_groups = canonical_fields(model).get("num_key_value_heads") or 4
    kept = (all_groups - 1, 0, all_groups)
    network, report = sliced(model, neurons=[80, 80, 0], shape=Shape(round_to=4, kv_groups=kept))
    assert network.config.key_value_heads == list(kept)
    assert network.config.neurons == [80, 80, 0]
    # The fits start from weights that are exact: what is left is rounding, in systems of condition 1e4 and less.
    assert relative_error(network(ids).logits, model(ids).logits) < 1e-9
    assert len(report.refit) == network.config.num_blocks


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-biased", "qwen3-tied", "phi"])
def test_query_heads_that_write_nothing(case):
    """One of the two query heads of every group, another one in each; together with a whole group."""
    model, ids = tiny_model(case), token_ids()
    size = canonical_fields(model).get("head_dim") or 12
    for layer in range(3):
        writer, columns = head_columns(model, layer, [0, 1])
        silent = [0, 1] if layer == 1 else [layer // 2, 3 - layer // 2]
        for head in silent:
            writer.weight[:, columns[size * head : size * head + size]] = 0
    network, _ = sliced(model, shape=Shape(round_to=4, kv_groups=(2, 1, 2), group_heads=(1, 2, 1)))
    assert network.config.attention_heads == [2, 2, 2]
    assert network.config.key_value_heads == [2, 1, 2]
    # As above: the fits start from weights that are exact.
    assert relative_error(network(ids).logits, model(ids).logits) < 1e-9


@torch.no_grad()
def test_the_constant_is_the_mean_of_what_the_block_wrote():
    """A deleted attention at full width leaves the mean of its outputs, weighted as the tokens are, from Hugging Face's
    own activations."""
    model, calibration = tiny_model("llama"), batches()
    network, _ = sliced(model, shape=Shape(kv_groups=(0, 2, 2)), calibration=calibration)
    written, streams = [], []
    layer = model.model.layers[0]
    handles = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output: written.append(output[0])),
        layer.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0])),
    ]
    for batch in calibration:
        model(batch.input_ids)
    for handle in handles:
        handle.remove()
    outputs, before = torch.cat(written).flatten(0, 1), torch.cat(streams).flatten(0, 1)
    squares = torch.maximum(*(states.square().sum(dim=1) for states in (before, before + outputs)))
    weights = (squares + 48 * model.config.rms_norm_eps).rsqrt()
    expected = (weights[:, None] * outputs).sum(dim=0) / weights.sum()
    assert relative_error(network.model.layers[0].self_attn.bias, expected) < 1e-10
    assert network.config.shortcuts == ["identity"] * 6


@torch.no_grad()
def test_a_fit_to_what_remains_is_better_than_none():
    """Closer to the dense model than with the same groups cut out of it."""
    model, calibration = tiny_model("llama"), batches(16)
    ids = torch.cat([batch.input_ids for batch in calibration])
    dense = model(ids).logits
    network, _ = sliced(model, shape=Shape(kv_groups=1), calibration=calibration)
    kept = network.model.layers[0].self_attn.q_proj.weight
    folded = model.model.layers[0].self_attn.q_proj.weight * model.model.layers[0].input_layernorm.weight
    (group,) = [group for group in (0, 1) if relative_error(kept, folded.view(2, 24, 48)[group]) < 1e-12]
    assert network.model.layers[0].self_attn.k_proj.weight.shape == (12, 48)
    for layer in range(3):
        writer, columns = head_columns(model, layer, [1 - group])
        writer.weight[:, columns] = 0
    assert relative_error(network(ids).logits, dense) < 0.8 * relative_error(model(ids).logits, dense)


@pytest.mark.parametrize("orientation", ["aligned", "random", "pca"])
def test_a_deleted_block_keeps_the_basis(orientation):
    """Its shortcut is the identity, at any width and orientation; but for a tied head, whose basis is fixed."""
    shortcut = "compact" if orientation == "aligned" else "dense"
    shape = Shape(shortcut, orientation, round_to=4, kv_groups=(2, 0, 1))
    network, report = sliced(tiny_model("llama-tied"), 36, [80, 0, 0], shape, orientation=orientation)
    assert network.config.shortcuts == [shortcut, shortcut, "identity", "identity", shortcut, "dense"]
    chosen = [values is not None for values in report.eigenvalues]
    assert chosen == [True, True, True, False, False, True, False]
    assert network(token_ids()).logits.isfinite().all()


def test_sizes():
    """What is stored: of each group its heads' rows and columns, of a part its constant."""
    model = tiny_model("llama")
    fields = canonical_fields(model)
    whole = stored_parameters(plan(fields, constant_widths(fields, 48)))
    config = plan(fields, constant_widths(fields, 48), Shape(), [80, 40, 0], (2, 1, 0))
    group, neuron = (2 * 12 + 2 * 12 + 2 * 12) * 48, 3 * 48
    assert stored_parameters(config) == whole - 3 * group - 120 * neuron + 2 * 48


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (3, r"kv_groups: must lie in \[0, 2\], the key/value groups of a layer, got 3"),
        ((2, 2), "kv_groups: must be one number, or 3, one a layer, got 2"),
        ((2, -1, 2), r"kv_groups: must lie in \[0, 2\], the key/value groups of a layer, got 2,-1,2"),
        ((0, 0, 0), "kv_groups: one layer at least must keep attention, got 0,0,0"),
    ],
)
def test_impossible_numbers(kept, message):
    with pytest.raises(SliceGPTError, match=message):
        sliced(tiny_model("llama"), shape=Shape(kv_groups=kept))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (3, r"group_heads: must lie in \[1, 2\], the query heads of a key/value group, got 3"),
        ((1, 0, 2), r"group_heads: must lie in \[1, 2\], the query heads of a key/value group, got 1,0,2"),
        ((1, 2), "group_heads: must be one number, or 3, one a layer, got 2"),
    ],
)
def test_impossible_groups(kept, message):
    with pytest.raises(SliceGPTError, match=message):
        sliced(tiny_model("llama"), shape=Shape(group_heads=kept))


def test_heads_under_one_norm():
    model = tiny_model("olmo2")
    with pytest.raises(
        SliceGPTError, match=r"kv_groups: olmo2 norms queries and keys over all heads .* got 2,1,0"
    ):
        sliced(model, shape=Shape(kv_groups=(2, 1, 0)))
    with pytest.raises(SliceGPTError, match=r"group_heads: olmo2 norms .* got some heads of a group"):
        sliced(model, shape=Shape(group_heads=1))


@pytest.mark.parametrize("neurons", [[80, 80], [80, 81, 80], [80, -1, 80]])
def test_impossible_neurons(neurons):
    with pytest.raises(SliceGPTError, match=r"neurons: must be 3 numbers in \[0, 80\], one a layer, got"):
        sliced(tiny_model("llama"), neurons=neurons)


def test_deleting_heads_needs_the_refit():
    with pytest.raises(SliceGPTError, match=r"kv_groups: .* decided by the refit, which is off"):
        sliced(tiny_model("llama"), shape=Shape(kv_groups=1), refit=False)
    with pytest.raises(SliceGPTError, match=r"group_heads: .* decided by the refit, which is off"):
        sliced(tiny_model("llama"), shape=Shape(group_heads=1), refit=False)
