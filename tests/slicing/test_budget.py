"""The memory of a run on paper: parts that are counted by hand, choices that follow the machine, and refusals."""

from dataclasses import replace

import pytest
import torch

from slicegpt.bench.models.architectures import fields_of
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
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
    assert parts["block of the dense model"] == {"device": 2 * 3 * neurons * width}
    assert parts["activations kept"] == {"device": 2 * tokens * neurons}
    assert parts["covariance"] == {"device": 8 * width * width}


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
    """An estimate may be wrong by 15 %."""
    config = sliced()
    peak = budget_of(config, replace(WORK, storage="device"), LARGE).peak("device")
    kept = budget_of(config, WORK, LARGE).parts()["activations kept"]["device"]
    machine = Machine(peak - kept, 1e12, 1e13)  # where they are not kept, for want of room
    budget = budget_of(config, replace(WORK, storage="device"), machine)
    tight = Machine(0.9 * budget.peak("device"), 1e12, 1e13)
    again = budget_of(config, replace(WORK, storage="device"), tight)
    if not again.fits:
        check_affordable(config, replace(WORK, storage="device"), tight)


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
