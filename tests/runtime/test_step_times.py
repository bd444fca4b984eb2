"""Times of a decoding step, solved from those of several networks, and measured."""

from dataclasses import astuple

import pytest
import torch

from slicegpt.conversion.speed_plan import dense_config, layer_elements
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.recipe import Recipe
from slicegpt.runtime import step_times
from slicegpt.runtime.step_times import measure_step_times, solve, timed_configs, with_step_times
from slicegpt.step_times import StepTimes
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
TIMES = StepTimes(2e-3, 1e-4, 4e-8, 5e-8, 6e-8)


def fields_of_tiny(name: str) -> dict:
    return canonical_fields(tiny_model(name))


def steps(configs: dict, times: StepTimes) -> dict[str, float]:
    return {
        name: times.seconds(config.num_hidden_layers, **layer_elements(config))
        for name, config in configs.items()
    }


@pytest.mark.parametrize("name", ["llama", "opt", "phi", "gemma2"])
def test_times_come_back_from_the_steps_that_they_make(name):
    """A linear system with as many unknowns as networks: each time comes back up to float64's roundings, of differences
    that are some 1e-2 of the steps. Where no columns can go, or there is one key/value group, the MLP's stands in."""
    configs = timed_configs(fields_of_tiny(name), torch.float32, CPU)
    times = TIMES
    if "columns" not in configs:
        times = StepTimes(*astuple(times)[:4], times.mlp)
    if "groups" not in configs:
        times = StepTimes(times.step, times.layer, times.mlp, times.mlp, times.shortcut)
    assert astuple(solve(configs, steps(configs, times))) == pytest.approx(astuple(times), rel=1e-9)


def test_noise_never_makes_a_time_negative_and_the_dense_step_stays():
    fields = fields_of_tiny("llama")
    configs = timed_configs(fields, torch.float32, CPU)
    plain, generator = steps(configs, TIMES), torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 1 + 0.2 * torch.rand(len(plain), generator=generator, dtype=torch.float64)
        seconds = {
            name: value * float(factor) for (name, value), factor in zip(plain.items(), noise, strict=True)
        }
        seconds["neurons"] = min(seconds["neurons"], 0.99 * seconds["dense"])
        found = solve(configs, seconds)
        assert min(astuple(found)) >= 0
        dense = found.seconds(configs["dense"].num_hidden_layers, **layer_elements(configs["dense"]))
        assert dense == pytest.approx(seconds["dense"], rel=1e-9)
    with pytest.raises(SliceGPTError, match="is not faster with half of the neurons"):
        solve(configs, plain | dict.fromkeys(("neurons", "groups"), 1.0))


def test_layers_outgrow_the_caches(monkeypatch):
    fields = fields_of_tiny("llama") | {"num_hidden_layers": 12}
    layer = 4 * sum(layer_elements(dense_config(fields)).values()) // 12
    monkeypatch.setitem(step_times.ENOUGH, "cpu", 5 * layer)
    configs = timed_configs(fields, torch.float32, CPU)
    assert configs.pop("layers").num_hidden_layers == 2
    assert {config.num_hidden_layers for config in configs.values()} == {5}
    monkeypatch.setitem(step_times.ENOUGH, "cpu", 1)
    assert timed_configs(fields, torch.float32, CPU)["dense"].num_hidden_layers == 2


def test_a_recipe_gets_what_was_measured(monkeypatch):
    monkeypatch.setattr(
        step_times, "measure_step_times", lambda fields, dtype, device, batch, progress: TIMES
    )
    fields = fields_of_tiny("llama")
    found = with_step_times(Recipe(target_speedup=1.2), fields, torch.float32, CPU)
    assert (found.decode_batch, found.step_times) == (1, str(TIMES))
    assert with_step_times(found, fields, torch.float32, CPU) is found
    other = Recipe(keep=0.9)
    assert with_step_times(other, fields, torch.float32, CPU) is other


def test_the_runtime_is_measured(monkeypatch):
    # Wide enough for half of the neurons to be seen; what comes is not compared with anything: it is a time.
    fields = fields_of_tiny("llama") | {"intermediate_size": 1 << 14, "dense_intermediate_size": 1 << 14}
    found = measure_step_times(fields, torch.float32, CPU, batch=2)
    assert found.mlp > 0
    monkeypatch.setattr(step_times, "free_memory", lambda device: 1000)
    with pytest.raises(SliceGPTError, match=r"target_speedup: timing the runtime takes .* 1.0 kB are free"):
        measure_step_times(fields, torch.float32, CPU)
