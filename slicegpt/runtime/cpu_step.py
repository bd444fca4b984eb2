"""A decode step on a CPU as one call: all blocks, with attention and cache, in one parallel region.

Between two kernels of a step there is only a barrier: no dispatch, no allocation, no waking of threads. One by one, the
kernels of a token through SmolLM2-135M would be 150 calls.
"""

import torch
from torch import Tensor

from slicegpt.ops.contracts import NormLinearInputs, norm_linear_columns
from slicegpt.ops.cpu import gemm
from slicegpt.ops.panels import PanelWeight
from slicegpt.runtime.cache import KVCache
from slicegpt.runtime.packed import PackedBlock, PackedNetwork


class CpuStep:
    """The blocks of a network, bound to a cache and to buffers for the activations between them.

    Args:
        packed: the network, on a CPU; see `is_supported`.
        cache: `run` takes batches of its size, and writes it.
    """

    @staticmethod
    def is_supported(packed: PackedNetwork, batch: int) -> bool:
        """Whether the kernels are built and support this dtype, number of rows and the blocks: none that reads nothing
        or has experts, attention first and without sinks."""
        return (
            packed.device.type == "cpu"
            and gemm.is_supported(None, packed.dtype, batch)
            and all(block.inputs and block.is_fused for block in packed.blocks)
            and all(one.attention is None for block in packed.blocks for one in block.inputs[1:])
        )

    def __init__(self, packed: PackedNetwork, cache: KVCache):
        self.packed, self.cache = packed, cache
        # Keeps the tensors alive whose addresses the step holds, besides the network's and the cache's.
        self._held: list[Tensor] = []
        # Two buffers for the residual stream, used in turn, and one for the results of a block's input GEMMs.
        self._streams = [self._empty(max(len(block.output) for block in packed.blocks)) for _ in range(2)]
        self._room = self._empty(max(_columns(block) for block in packed.blocks))
        self._step = gemm.new_step(packed.dtype)
        for index, block in enumerate(packed.blocks):
            self._add(index, block)
        self._result = self._streams[(len(packed.blocks) - 1) % 2][:, : len(packed.blocks[-1].output)]

    def run(self, stream: Tensor, positions: Tensor, slot: int, padded: bool) -> Tensor:
        """The residual stream after all blocks, [batch, d'], in a buffer that the next call overwrites.

        Args:
            stream: [batch, d] at boundary 0.
            positions: int64 [batch], contiguous.
            slot: the cache slot that the token is written to.
            padded: whether any entry of `cache.valid` is False.
        """
        valid = self.cache.valid.data_ptr() if padded else 0
        threads = torch.get_num_threads()
        self._step.run(stream.data_ptr(), stream.stride(0), positions.data_ptr(), valid, slot, threads)
        return self._result

    def _add(self, index: int, block: PackedBlock) -> None:
        inputs, attention, begin = [], None, 0
        width = block.inputs[0].weight.shape[1]
        # Block 0 reads the stream that `run` is given, so only the shape of `h` matters there.
        h = (self._streams[(index - 1) % 2] if index else self._empty(width))[:, :width]
        for projection in block.inputs:
            weight = self._rows(projection.weight)
            columns = norm_linear_columns(weight, projection.n_scaled, projection.activation)
            y = self._room[:, begin : begin + columns]
            begin += columns
            inputs.append(
                gemm.norm_linear_arguments(
                    NormLinearInputs(
                        h, weight, self._line(projection.bias), None, projection.n_scaled, projection.activation,
                        block.width, block.eps,
                    ),
                    y,
                )
            )  # fmt: skip
        facts, read, window = block.inputs[0].attention, 0, 0
        if facts is not None:
            rotary = None if facts.rotary is None else self.packed.rotary[facts.rotary]
            read, window = 2 * facts.key_heads * facts.head_dim, facts.window or 0
            keys, values = self.cache.of_layer(facts.layer)
            attention = gemm.attention_arguments(
                self._room,
                keys,
                values,
                self.cache.valid,
                rotary,
                self._line(facts.norm),
                facts.norm_eps,
                facts.rotate_first,
                facts.heads,
            )
        output = gemm.rotate_add_arguments(
            self._room[:, read:begin],
            self._rows(block.output),
            h,
            None if block.shortcut is None else self._rows(block.shortcut),
            self._line(block.output_bias),
            self._streams[index % 2][:, : len(block.output)],
            None,
        )
        self._step.add(inputs=inputs, attention=attention, window=window, output=output)

    def _empty(self, columns: int) -> Tensor:
        # Rows of different threads' columns on cache lines of their own.
        memory = torch.empty(
            (self.cache.batch, -(-columns // 64) * 64), dtype=self.packed.dtype, device=self.packed.device
        )
        self._held.append(memory)
        return memory

    def _rows(self, weight: Tensor | PanelWeight) -> Tensor | PanelWeight:
        """The weight with contiguous rows, as the kernels read it; copied only where it has none."""
        if not isinstance(weight, PanelWeight) and weight.stride(1) != 1:
            weight = weight.contiguous()
            self._held.append(weight)
        return weight

    def _line(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self._held.append(tensor)
        return tensor


def _columns(block: PackedBlock) -> int:
    """Columns that the input GEMMs of a block write, side by side."""
    return sum(norm_linear_columns(one.weight, one.n_scaled, one.activation) for one in block.inputs)
