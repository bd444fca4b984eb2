"""How long a decoding step of `Runtime` takes on this machine, by what it reads; see `slicegpt.step_times`.

Networks of the model's shape with random weights decode in turns: the dense one with two numbers of layers, and with as
many layers one with half of the neurons, one with fewer key/value groups, and one with fewer columns, which has
shortcuts. Differences between them are what a layer takes, and an element of each kind of weight. Layers are as many as
outgrow the caches, so that weights come from memory, as those of the whole model do.
"""

from __future__ import annotations

import torch

from slicegpt.conversion.multiples import multiple_of
from slicegpt.conversion.plan import Shape, constant_widths, plan, width_for_slice
from slicegpt.conversion.speed_plan import dense_config, layer_elements
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.random_weights import random_model
from slicegpt.modeling.sizes import format_bytes, stored_bytes
from slicegpt.progress import Progress
from slicegpt.recipe import Recipe
from slicegpt.runtime.engine import Runtime
from slicegpt.runtime.speed import timed_in_turns
from slicegpt.step_times import StepTimes

# Bytes of the layers that are timed, a few times what the caches of a processor or a GPU hold.
ENOUGH = {"cpu": 1 << 28, "cuda": 1 << 29}

# Of the columns so many go in the network that has shortcuts.
NARROWER = 1 / 8

PROMPT, TOKENS, TURNS, SECONDS = 16, 24, 9, 10.0


def with_step_times(
    recipe: Recipe,
    fields: dict,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Recipe:
    """The recipe with the times that its `target_speedup` is planned by, measured where it has none; or as it is.

    Args:
        fields: `slicegpt.families.canonical_fields` of the dense model.
        dtype, device: of the weights, and where they are.

    Raises:
        SliceGPTError: a model that the runtime does not run, or not enough memory.
    """
    if recipe.target_speedup is None or recipe.step_times is not None:
        return recipe
    batch = recipe.decode_batch or 1
    times = measure_step_times(fields, dtype, device, batch, progress)
    return recipe.override(decode_batch=batch, step_times=str(times))


def measure_step_times(
    fields: dict,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    progress: Progress | None = None,
) -> StepTimes:
    """What a decoding step of `batch` sequences takes, with a few hundred tokens in the cache at most.

    Args:
        fields: `slicegpt.families.canonical_fields` of the dense model.

    Raises:
        SliceGPTError: a model that the runtime does not run, or not enough memory.
    """
    progress = progress or Progress(quiet=True)
    configs = timed_configs(fields, dtype, device)
    needed = sum(stored_bytes(config, dtype) for config in configs.values())
    needed += max(stored_bytes(config, dtype) for config in configs.values())  # one at a time is packed
    if needed > free_memory(device):
        raise SliceGPTError(
            f"timing the runtime takes {format_bytes(needed)} of memory, {format_bytes(free_memory(device))} are free;"
            " give step_times of a run that had them",
            "target_speedup",
        )
    with progress.step("timing the runtime"):
        runtimes = [
            Runtime(random_model(config, dtype, device), max_length=PROMPT + TOKENS + 1, release=True)
            for config in configs.values()
        ]
        prompt = torch.arange(PROMPT, device=device).remainder(fields["vocab_size"]).repeat(batch, 1)
        rates = timed_in_turns(runtimes, prompt, TOKENS, TURNS, SECONDS)
    # The fastest turn: other load only ever adds, and differs from turn to turn.
    seconds = {name: 1 / max(own) for name, own in zip(configs, rates, strict=True)}
    return solve(configs, seconds)


def timed_configs(fields: dict, dtype: torch.dtype, device: torch.device) -> dict[str, SlicedConfig]:
    """The networks that are timed; "groups" where there are several key/value groups, "columns" where some can go."""
    whole = dense_config(fields)
    layer = sum(layer_elements(whole).values()) * dtype.itemsize / whole.num_hidden_layers
    enough = ENOUGH["cuda" if device.type == "cuda" else "cpu"]
    layers = min(whole.num_hidden_layers, max(2, -(-enough // int(layer))))
    short = dict(fields, num_hidden_layers=layers, **_first(fields, layers))
    width, groups = fields["dense_hidden_size"], whole.num_key_value_heads
    full = constant_widths(short, width)
    found = {"dense": plan(short, full, Shape())}
    if layers > 1:
        fewer = dict(fields, num_hidden_layers=layers // 2, **_first(fields, layers // 2))
        found["layers"] = plan(fewer, constant_widths(fewer, width), Shape())
    found["neurons"] = plan(short, full, Shape(neurons=0.5))
    if groups > 1 and not (found["dense"].qk_norm and found["dense"].qk_norm_whole):
        found["groups"] = plan(short, full, Shape(kv_groups=groups // 2))
    step = multiple_of("auto", width, device)
    narrow = width_for_slice(width, NARROWER, step)
    if not found["dense"].post_norm and width > narrow >= found["dense"].head_dim:
        found["columns"] = plan(short, constant_widths(short, narrow), Shape())
    return found


def _first(fields: dict, layers: int) -> dict:
    """Those of a model's lists that have a value a layer, cut to the first layers."""
    whole = fields["num_hidden_layers"]
    return {
        name: value[:layers]
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == whole and name != "boundary_widths"
    }


def solve(configs: dict[str, SlicedConfig], seconds: dict[str, float]) -> StepTimes:
    """From the steps of several networks to what they are the sums of.

    Whatever is measured to take less than nothing takes nothing. The sum for the dense network is what was measured.

    Args:
        seconds: of a step of each of `configs`.
    """
    elements = {name: layer_elements(config) for name, config in configs.items()}
    dense, whole, layers = seconds["dense"], elements["dense"], configs["dense"].num_hidden_layers

    def each(name: str, kind: str) -> float:
        return max(0.0, dense - seconds[name]) / (whole[kind] - elements[name][kind])

    if "layers" in configs:
        fewer = layers - configs["layers"].num_hidden_layers
        a_layer = min(dense / layers, max(0.0, dense - seconds["layers"]) / fewer)
    else:
        a_layer = dense
    mlp = each("neurons", "mlp")
    attention = each("groups", "attention") if "groups" in configs else mlp
    weights = (mlp * whole["mlp"] + attention * whole["attention"]) / layers
    if not weights > 0:
        raise SliceGPTError(
            "the runtime is not faster with half of the neurons, on this machine", "target_speedup"
        )
    # What differences of two noisy figures may not do: cost more than the layer has.
    share = min(1.0, a_layer / weights) if a_layer > 0 else 0.0
    mlp, attention = mlp * share, attention * share
    if not mlp > 0:
        raise SliceGPTError("the runtime's layers take no time that can be measured here", "target_speedup")
    times = StepTimes(dense - layers * a_layer, max(0.0, a_layer - weights * share), mlp, attention, 0.0)
    shortcut = mlp
    if "columns" in configs:
        narrow = elements["columns"]
        rest = times.seconds(configs["columns"].num_hidden_layers, **narrow)
        shortcut = max(0.0, seconds["columns"] - rest) / max(1, narrow["shortcut"])
    return StepTimes(times.step, times.layer, mlp, attention, shortcut)
