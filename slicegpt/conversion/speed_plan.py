"""From a speed-up to a time that one decoding step may take, and how long it takes with a configuration."""

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import skeleton
from slicegpt.step_times import StepTimes

# Plans are found by whole numbers; a neuron of a small model takes some 1e-8 seconds.
UNITS = 10**15


def layer_elements(config: SlicedConfig) -> dict[str, int]:
    """Elements of the layers, by what `StepTimes` tells apart."""
    found = {"mlp": 0, "attention": 0, "shortcut": 0}
    for name, parameter in skeleton(config).model.layers.named_parameters():
        kind = "shortcut" if "shortcut" in name else "mlp" if ".mlp." in name else "attention"
        found[kind] += parameter.numel()
    return found


def step_units(config: SlicedConfig, times: StepTimes) -> int:
    """What one decoding step of a network takes, in femtoseconds."""
    return round(UNITS * times.seconds(config.num_hidden_layers, **layer_elements(config)))


def dense_config(fields: dict) -> SlicedConfig:
    """The dense model itself, as a network of full width."""
    return plan(fields, constant_widths(fields, fields["dense_hidden_size"]), Shape())


def target_units(fields: dict, speedup: float, times: StepTimes) -> int:
    """What one decoding step may take, in femtoseconds.

    Args:
        fields: `slicegpt.families.canonical_fields` of the dense model.
        speedup: steps a second, in those of the dense model.

    Raises:
        SliceGPTError: slicing cannot reach it, whatever is deleted; the argument is "target_speedup".
    """
    dense = step_units(dense_config(fields), times)
    least = times.seconds(fields["num_hidden_layers"], 0, 0, 0)
    most = dense / UNITS / least if least else float("inf")
    if speedup >= most:
        raise SliceGPTError(
            f"must be less than {most:.2f}: so many times as fast would be a step without any weights in the layers, "
            f"got {speedup:g}",
            "target_speedup",
        )
    return int(dense / speedup)
