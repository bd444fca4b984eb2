"""The memory of a run on paper: parts that are counted by hand, choices that follow the machine, and refusals."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig

from slicegpt.bench.models.architectures import fields_of, fields_of_config
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.sizes import active_parameters, stored_parameters
from slicegpt.recipe import Recipe
from slicegpt.slicing.affordable import advice, best_budget, check_affordable, this_machine, workload_of
from slicegpt.slicing.budget import budget_of
from slicegpt.slicing.effort import OperationRates, effort_of, selection, solving
from slicegpt.slicing.workload import Machine, Workload

WORK = Workload(128, 2048, 8, dtype=torch.float16, teacher_dtype=torch.float16, on_gpu=True)
LARGE = Machine(1e12, 1e12, 1e13)


def sliced(name: str = "llama-2-70b", width: int = 6528, neurons: float = 0.25):
    fields = fields_of(name)
    return plan(fields, constant_widths(fields, width), Shape(neurons=neurons))


def test_the_large_parts_of_llama_2_70b():
    """By hand: streams of two networks, moments, the system, an MLP, all in bytes."""
    parts = budget_of(sliced(), WORK, LARGE).parts()
    tokens, width, neurons = 128 * 2048, 8192, 28672
    assert parts["streams"] == {"device": 2 * tokens * width * 2}
    assert parts["moments"] == {"device": 8 * neurons * (neurons + width)}
    assert parts["system or its inverse"] == {"device": 8 * neurons * neurons}
    # Its output weights are the layer's own.
    assert parts["block of the dense model"] == {"device": 2 * 2 * neurons * width}
    assert parts["activations kept"] == {"device": 2 * tokens * neurons}
    assert parts["covariance"] == {"device": 8 * width * width}


def test_the_large_parts_of_mixtral():
    """By hand: of all eight experts the moments, the fits and the blocks, of one of them the system."""
    fields = fields_of_config(MixtralConfig(num_hidden_layers=1))
    config = plan(fields, constant_widths(fields, 3264), Shape(neurons=0.25))
    parts = budget_of(config, WORK, LARGE).parts()
    experts, width, neurons = 8, 4096, 14336
    assert parts["moments"] == {"device": 8 * experts * neurons * (neurons + width)}
    assert parts["fits"] == {"device": 3 * 8 * experts * neurons * width}
    assert parts["block of the dense model"] == {"device": 2 * 3 * experts * neurons * width}
    assert parts["system or its inverse"] == {"device": 8 * neurons * neurons}
    _, before, behind = config.boundary_widths
    idle = (experts - 2) * config.neurons[0] * (2 * before + behind)
    assert stored_parameters(config) - active_parameters(config) == idle


def test_nothing_grows_with_the_number_of_layers():
    fields = fields_of("llama-2-70b")
    peaks = []
    for layers in (2, 80):
        own = fields | {"num_hidden_layers": layers}
        config = plan(own, constant_widths(own, 6528), Shape(neurons=0.25))
        peaks.append(budget_of(config, WORK, LARGE).peak("device"))
    assert peaks[0] == peaks[1]


def test_what_leaves_a_small_device():
    """20 GB: streams on the host, where they take at most half of its memory; moments too, while a system is solved."""
    small = best_budget(sliced(), WORK, Machine(20e9, 32e9, 1e12))
    assert small.fits
    assert (small.storage, small.spills) == ("host", True)
    assert small.parts()["moments"]["host"] == 8 * 28672 * (28672 + 8192)
    assert small.parts()["streams"] == {"host": 2 * 128 * 2048 * 8192 * 2}
    large = best_budget(sliced(), WORK, Machine(141e9, 256e9, 1e12))
    assert (large.storage, large.spills, large.fits) == ("device", False, True)
    tiny = best_budget(sliced(), WORK, Machine(20e9, 18e9, 1e12))
    assert tiny.storage == "disk"
    assert (
        "streams" not in tiny.peak_stage("host").parts
        or "host" not in tiny.peak_stage("host").parts["streams"]
    )


def test_ranks_share_the_samples():
    shared = replace(WORK, ranks=8)
    assert shared.tokens == WORK.tokens // 8
    assert budget_of(sliced(), shared, LARGE).parts()["streams"]["device"] == 2 * 128 * 2048 * 8192 * 2 // 8
    assert replace(WORK, ranks=3).tokens == 6 * 8 * 2048  # sixteen batches among three: six at most
    assert replace(WORK, samples=5, batch_size=8).tokens == 5 * 2048


def test_a_cpu_is_device_and_host():
    work = replace(WORK, on_gpu=False)
    budget = budget_of(sliced(), work, Machine(64e9, 64e9, 1e12))
    assert budget.peak("device") == 0
    assert budget.peak("host") > 8 * 28672 * (2 * 28672)


def test_a_run_that_cannot_fit_names_what_would():
    config, small = sliced(), Machine(20e9, 32e9, 1e12)
    everything = replace(WORK, storage="device")
    with pytest.raises(SliceGPTError) as caught:
        check_affordable(config, everything, small)
    line = str(caught.value)
    assert line.startswith("memory: the run takes about ")
    assert "GB of the GPU's memory, of which 20.0 GB are free" in line
    assert line.endswith("; --activation-storage host would make it fit")
    assert "\n" not in line
    hopeless = Machine(2e9, 4e9, 1e12)
    assert advice(config, WORK, hopeless) == (
        "no storage, batch size or number of samples makes it fit; take a machine with more memory"
    )


def test_a_run_near_the_limit_is_not_refused():
    """An estimate may be wrong by 15 %: with 5 % less than the least that it says a run begins, with 20 % less not."""
    config, work = sliced(), replace(WORK, storage="device")
    least = budget_of(config, work, Machine(1, 1e12, 1e13)).peak("device")  # nothing is kept that can leave
    tight = Machine(0.95 * least, 1e12, 1e13)
    budget = check_affordable(config, work, tight)
    assert not budget.fits
    assert budget.spills
    assert budget.peak("device") == least
    with pytest.raises(SliceGPTError, match=r"^memory: the run takes about "):
        check_affordable(config, work, Machine(0.8 * least, 1e12, 1e13))


def on_a_cpu(memory: float):
    """Llama-2-70B's widths with two layers, in bfloat16, 8 x 512 tokens, 7936 columns and 22,912 neurons."""
    fields = fields_of("llama-2-70b") | {"num_hidden_layers": 2}
    config = plan(fields, constant_widths(fields, 7936), Shape(neurons=0.2))
    half = {"dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16}
    return budget_of(config, Workload(8, 512, 1, **half, ridges=1), Machine(memory, memory, 1e12))


def test_what_leaves_a_small_host():
    """12 GB: moments are files from the beginning, input weights while their block is fitted."""
    width, neurons, columns = 8192, 28672, 7936
    moments, readers = 8 * neurons * (neurons + width), 2 * 2 * neurons * columns
    activations = 2 * 8 * 512 * neurons
    small, large = on_a_cpu(12e9), on_a_cpu(64e9)
    assert small.fits
    assert small.peak("host") < 11.5e9
    assert small.peak("disk") == moments + readers + activations
    assert small.parts()["moments"]["disk"] == moments
    collecting = next(stage for stage in small.stages if stage.name == "mlp: collecting")
    assert collecting.parts["moments"] == {"disk": moments}
    assert collecting.parts["activations kept"] == {"disk": activations}
    assert small.peak_stage("host").name == "mlp: choosing neurons"
    # Where there is room, all of it is in memory, and the activations are kept as well.
    assert (large.spills, large.peak("disk")) == (False, 0)
    assert large.parts()["activations kept"] == {"host": activations}
    assert large.parts()["moments"] == {"host": moments}


def test_the_allocation_of_neurons_is_planned():
    """Of the dense model: its block without a copy of the output weights, a quarter of the batches, one stream."""
    stages = {stage.name: stage.parts for stage in on_a_cpu(64e9).stages}
    collecting, deleting = (stages[f"allocation: {what}"] for what in ("collecting", "deleting neurons"))
    width, neurons, heads = 8192, 28672, 64 * 128
    assert collecting["streams"] == {"host": 2 * 2 * 512 * width}
    assert collecting["block of the dense model"] == {"host": 2 * 2 * neurons * width}
    assert collecting["layer as stored"] == {"host": 2 * width * (3 * neurons + 2 * heads + 2 * 1024)}
    assert deleting["layer as stored"] == {"host": 2 * width * neurons}
    assert deleting["system or its inverse"] == {"host": 8 * neurons * neurons}
    plain = plan(
        fields_of("llama-2-70b"), constant_widths(fields_of("llama-2-70b"), 7936), Shape(neurons=0.0)
    )
    names = {stage.name for stage in budget_of(plain, WORK, LARGE).stages}
    assert not any(name.startswith("allocation") for name in names)


def test_what_rounding_takes():
    """By hand: weights in float64 four times, the moments of what they read three times, the system and its factor."""
    config, width, neurons = sliced(), 8192, 28672
    stages = {
        stage.name: stage.parts for stage in budget_of(config, replace(WORK, rounds=True), LARGE).stages
    }
    before, kept, gated = 6528, config.neurons[0], 2 * neurons
    readers, writers = (stages[f"mlp: rounding what {does}"] for does in ("reads", "writes"))
    rounding = (4 * 8 + 2) * gated * before + 3 * 8 * before**2
    assert readers["rounding"] == {"device": rounding}
    assert (
        readers["block of the sliced model"]["device"] >= 4 * gated * before
    )  # in float32 until they are rounded
    # The last one of them, which writes on all columns, for the head.
    assert writers["rounding"] == {"device": 8 * width * (neurons + 3 * kept) + 2 * width * kept}
    assert writers["system or its inverse"] == {"device": 2 * 8 * kept**2}
    assert writers["moments"] == {"device": 8 * neurons * (neurons + width)}
    assert writers["codes"] == stages["mlp: fitting"]["codes"] == {"device": gated * before}
    plain = {stage.name for stage in budget_of(config, WORK, LARGE).stages}
    assert stages.keys() - plain == {
        f"{part}: rounding what {does}" for part in ("attention", "mlp") for does in ("reads", "writes")
    }


def test_a_recipe_as_work(tmp_path):
    recipe = Recipe(
        params=0.9, calibration="a.txt:2,self:1", ridge=0.3, refit_share=0.5, nsamples=10, batch_size=4
    )
    work = workload_of(recipe.resolved(), torch.float32, torch.device("cpu"))
    assert (work.own_text, work.ridges, work.share, work.on_gpu) == (True, 1, 0.5, False)
    assert (work.tokens, work.fitted_tokens) == (10 * 2048, 2 * 4 * 2048)
    assert workload_of(Recipe(params=0.9, refit=False).resolved(), torch.float32, None).share == 0
    machine = this_machine(torch.device("cpu"), tmp_path)
    assert machine.device == machine.host > 0
    assert machine.disk > 0


def test_operations_of_one_layer():
    """Solve and selection by hand, and what they are multiplied from."""
    assert solving(300, 100) == 9e6 + 2 * 9e4 * 100
    assert selection(300, 100, 50) == solving(300, 100) + 18e6 + 2 * 50 * 300 * 400
    fields = fields_of("llama-1b")
    config = plan(fields, constant_widths(fields, 1536), Shape(neurons=0.0))
    work = Workload(8, 512, 8, ridges=1)
    effort = effort_of(config, work)
    tokens, width, neurons = 4096, 2048, 5632
    attention = 2 * width + 2 * 4 * 64
    dense = 22 * (2 * width * (attention + 3 * neurons) + 2 * 512 * width)
    assert effort.stages["teacher"]["half"] == tokens * dense
    assert effort.stages["covariance"]["gram"] == tokens * 44 * width * width
    assert effort.stages["refit"]["fp64"] == 22 * (solving(width, width) + solving(neurons, width))
    assert "allocation" not in effort.stages  # no neurons are deleted
    assert "ridge" not in effort.stages
    seconds = effort.seconds(OperationRates(2e12, 1e12, 1e12, 1e11, "by hand"))
    assert seconds["teacher"] == tokens * dense / 2e12
