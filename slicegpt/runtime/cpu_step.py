"""A decode step on a CPU as one call: all blocks, attention and cache included, in one parallel region.

Between the kernels of a step there is a barrier and nothing else: no dispatch, no allocation, no thread to be woken,
where a token through SmolLM2-135M would take 150 calls.
"""

import torch
from torch import Tensor

from slicegpt.ops.contracts import NormLinearInputs, norm_linear_columns
from slicegpt.ops.cpu import gemm
from slicegpt.runtime.cache import KVCache
from slicegpt.runtime.packing import PackedBlock, PackedNetwork


class CpuStep:
    """The blocks of a network, bound to a cache and to memory for what passes between them.

    Args:
        packed: on a CPU, see `is_supported`.
        cache: of the batch size that `run` is to take; written by it.
    """

    @staticmethod
    def is_supported(packed: PackedNetwork, batch: int) -> bool:
        """Whether the kernels take this network (built, dtype, few rows; attention ahead of other inputs)."""
        return (
            packed.device.type == "cpu"
            and gemm.is_supported(None, packed.dtype, batch)
            and all(one.attention is None for block in packed.blocks for one in block.inputs[1:])
        )

    def __init__(self, packed: PackedNetwork, cache: KVCache):
        self.packed, self.cache = packed, cache
        self._held: list[Tensor] = []  # what the step has addresses of, besides the network's and the cache's
        # Views of three: two streams that take turns, and what the inputs of a block write.
        self._streams = [self._empty(max(len(block.output) for block in packed.blocks)) for _ in range(2)]
        self._room = self._empty(max(_columns(block) for block in packed.blocks))
        self._step = gemm.new_step(packed.dtype)
        for index, block in enumerate(packed.blocks):
            self._add(index, block)
        self._result = self._streams[(len(packed.blocks) - 1) % 2][:, : len(packed.blocks[-1].output)]

    def run(self, stream: Tensor, positions: Tensor, slot: int, padded: bool) -> Tensor:
        """The stream [batch, d] at boundary 0 to the one past all blocks: memory that the next call overwrites.

        positions: int64 [batch], contiguous. slot: where the token goes in the cache. padded: whether `cache.valid`
        hides anything.
        """
        valid = self.cache.valid.data_ptr() if padded else 0
        threads = torch.get_num_threads()
        self._step.run(stream.data_ptr(), stream.stride(0), positions.data_ptr(), valid, slot, threads)
        return self._result

    def _add(self, index: int, block: PackedBlock) -> None:
        inputs, attention, begin = [], None, 0
        width = block.inputs[0].weight.shape[1]
        # Where the step finds this block's stream it says itself; the shape is the network's.
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
            rotary = self.packed.rotary
            read, window = 2 * facts.key_heads * facts.head_dim, facts.window or 0
            keys, values = self.cache.keys[facts.layer], self.cache.values[facts.layer]
            attention = gemm.attention_arguments(
                self._room,
                keys,
                values,
                self.cache.valid,
                rotary,
                self._line(facts.norm),
                facts.norm_eps,
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

    def _rows(self, weight: Tensor) -> Tensor:
        """The kernels read rows of consecutive items; a copy is the exception."""
        if weight.stride(1) != 1:
            weight = weight.contiguous()
            self._held.append(weight)
        return weight

    def _line(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self._held.append(tensor)
        return tensor


def _columns(block: PackedBlock) -> int:
    """What the inputs of a block write, side by side."""
    return sum(norm_linear_columns(one.weight, one.n_scaled, one.activation) for one in block.inputs)
