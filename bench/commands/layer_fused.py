"""One transformer layer as `slicegpt.runtime` runs it: packed weights, `norm_linear`, attention, `rotate_add`."""

import torch
from torch import Tensor

from slicegpt.bench.commands.layer_ops import LayerRun, Operation, State, layer_inputs, module_run, one_layer
from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.random_weights import random_model
from slicegpt.modeling.sizes import skeleton
from slicegpt.ops.contracts import block_sums_of_squares, sumsq_dtype
from slicegpt.runtime import pack
from slicegpt.runtime.cache import GrowingStep, KVCache
from slicegpt.runtime.executor import Executor
from slicegpt.runtime.packed import PackedBlock, Projection


@torch.no_grad()
def fused(variant: str, config: SlicedConfig, batch: int, seqlen: int, dtype, device) -> LayerRun:
    """The layer of `layer_ops.unfused`, with the same random weights, packed.

    Raises:
        SliceGPTError: the runtime does not support the network.
    """
    model = random_model(one_layer(config), dtype, device)
    network = Executor(pack(model, seqlen))
    inputs = layer_inputs(model, batch, seqlen)
    positions = torch.arange(seqlen, device=device).expand(batch, seqlen)
    cache = KVCache.allocate(model.config, batch, seqlen, dtype, device)
    step = GrowingStep(cache, seqlen, network.angles(positions), 0, padded=False)
    operations = [
        operation for block in network.packed.blocks for operation in block_operations(network, block, step)
    ]
    rows = inputs.stream.flatten(0, 1)
    state = {"stream": rows, "sums": block_sums_of_squares(rows.to(sumsq_dtype(dtype)))}

    def whole() -> Tensor:
        stream, _ = network.blocks(state["stream"], step, state["sums"])
        return stream

    return LayerRun(variant, operations, whole, state, module_run(model.model.layers[0], inputs))


def reason_against(config: SlicedConfig) -> str | None:
    """Why the runtime does not support a network; None where it does."""
    try:
        pack(skeleton(one_layer(config)), 1)  # on the meta device: only the error counts
    except SliceGPTError as error:
        return str(error)
    return None


def block_operations(network: Executor, block: PackedBlock, step: GrowingStep) -> list[Operation]:
    """The operations of one block; the last one writes the new stream to "stream" and "output"."""

    def read(projection: Projection, index: int) -> Operation:
        def run(state: State) -> None:
            state[f"piece {index}"] = network._project(
                projection, state["stream"], state["sums"], block.width, block.eps
            )

        name = "norm + q + k + v" if projection.attention else "norm + up + activation"
        if projection.activation.endswith("_gated"):
            name = "norm + gate + up + activation"
        return Operation(name, run)

    def attend(projection: Projection, index: int) -> Operation:
        def run(state: State) -> None:
            state[f"piece {index}"] = step.attend(projection.attention, state[f"piece {index}"])

        return Operation("attention", run)

    def write(state: State) -> None:
        pieces = [state[f"piece {index}"] for index in range(len(block.inputs))]
        a = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        state["stream"], state["sums"] = network._rotate(block, a, state["stream"])
        state["output"] = state["stream"]

    operations, writers = [], []
    for index, projection in enumerate(block.inputs):
        operations.append(read(projection, index))
        if projection.attention:
            operations.append(attend(projection, index))
        writers.append("out" if projection.attention else "down")
    return [*operations, Operation(" + ".join([*writers, "shortcut"]), write)]
