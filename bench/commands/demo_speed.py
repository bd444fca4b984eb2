"""The speed part of `slicegpt demo`: Hugging Face's generate(), the runtime dense and the runtime sliced, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from slicegpt.bench.commands.token_time import TokenOptions, measure_token_times
from slicegpt.bench.harness.record import Record
from slicegpt.bench.models.engines import ENGINES, BenchmarkCase
from slicegpt.bench.models.networks import MeasuredNetwork
from slicegpt.conversion.plan import constant_widths, plan
from slicegpt.families import canonical_fields
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.progress import Progress
from slicegpt.runtime import Runtime

GENERATE, RUNTIME = "hf-generate", "fused"
# Eight turns of four steps: enough for a median, and some ten seconds in all.
HOW = TokenOptions(tokens=32, rounds=8)


def networks_of(
    dense: PreTrainedModel, name: str, sliced: Mapping[str, tuple[SlicedForCausalLM, Path]]
) -> list[MeasuredNetwork]:
    """The models in memory as what `slicegpt bench token` measures, the dense one first.

    Args:
        dense: with its `name`.
        sliced: by label, each with the folder that holds it.
    """
    fields = canonical_fields(dense)
    whole = plan(fields, constant_widths(fields, fields["dense_hidden_size"]))
    found = [MeasuredNetwork("dense", name, whole, dense.dtype, dense.device, name, dense.config)]
    found[0]._models["huggingface"] = dense
    for label, (model, folder) in sliced.items():
        network = MeasuredNetwork(label, str(folder), model.config, model.dtype, model.device, str(folder))
        network._models["canonical"] = model
        found.append(network)
    return found


def measure_demo_speed(
    networks: list[MeasuredNetwork], record: Record, progress: Progress
) -> dict[str, Runtime]:
    """Fill `record` with the rows of `slicegpt bench token`; returns the runtimes by label, to generate with."""
    cases = [BenchmarkCase(networks[0], ENGINES[GENERATE])]
    cases += [BenchmarkCase(network, ENGINES[RUNTIME]) for network in networks]
    measure_token_times(cases, HOW, None, record, progress)
    record.finish()
    return {network.label: network.runtime() for network in networks}
