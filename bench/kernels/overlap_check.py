"""Overlapping kernels (programmatic dependent launch) give the bits of kernels one after the other, over many replays.

    python -m slicegpt.bench.kernels.overlap_check --json overlap.json

A kernel that reads what the one before it has not written yet is wrong only sometimes: here some layers of a network
decode one token in a CUDA graph, replayed hundreds of times over inputs that differ from one replay to the next, and
every output must be that of the same graph captured with SLICEGPT_PDL=0. Where there is no GPU the layers run without a
graph: that shows only that the check itself runs. Exit status 1 where any bit differs.
"""

import argparse
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from slicegpt.bench.commands.layer_ops import first_layers
from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import Record
from slicegpt.bench.models.architectures import MODELS, sliced_config
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.random_weights import random_model
from slicegpt.ops.cuda.decode import decode_device
from slicegpt.runtime import pack
from slicegpt.runtime.cache import KVCache, StaticStep
from slicegpt.runtime.executor import Executor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
INPUTS = 8
CAPACITY = 256


class Layers:
    """The first layers of a network with random weights, decoding a token from any of `INPUTS` streams."""

    def __init__(self, config: SlicedConfig, batch: int, dtype: torch.dtype):
        model = random_model(config, dtype, DEVICE)
        self.executor = Executor(pack(model, CAPACITY), through_operators=True)
        self.cache = KVCache.allocate(model.config, batch, CAPACITY, dtype, DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(1)
        for states in (self.cache.keys, self.cache.values):
            states.normal_(generator=generator)
        shape = (INPUTS, batch, config.boundary_widths[0])
        self.streams = torch.empty(shape, dtype=dtype, device=DEVICE).normal_(generator=generator)
        self.stream = self.streams[0].clone()
        self.slot = torch.tensor([CAPACITY // 2], device=DEVICE)
        self.positions = torch.full((batch,), CAPACITY // 2, device=DEVICE)
        self.output: Tensor | None = None

    def run(self) -> None:
        step = StaticStep(self.cache, self.executor.angles(self.positions), self.slot)
        self.output, _ = self.executor.blocks(self.stream, step)

    @torch.inference_mode()
    def captured(self, overlap: bool) -> Callable[[int], Tensor]:
        """input -> output [batch, d], in a buffer that the next call reuses."""
        before = os.environ.get("SLICEGPT_PDL")
        os.environ["SLICEGPT_PDL"] = "1" if overlap else "0"
        decode_device.cache_clear()
        try:
            self.run()  # compiles, and allocates workspaces
            replay = self.run
            if ON_GPU:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.run()
                replay = graph.replay
            output = self.output
        finally:
            os.environ.pop("SLICEGPT_PDL")
            if before is not None:
                os.environ["SLICEGPT_PDL"] = before
            decode_device.cache_clear()

        @torch.inference_mode()
        def call(index: int) -> Tensor:
            self.stream.copy_(self.streams[index])
            replay()
            return output if ON_GPU else self.output

        return call


@torch.inference_mode()
def mismatches(layers: Layers, replays: int) -> tuple[int, int]:
    """Replays whose output differs in any bit, of the overlapped graph and of the one without overlap."""
    serial = layers.captured(overlap=False)
    expected = [serial(index).clone() for index in range(INPUTS)]
    if not all(one.isfinite().all() for one in expected):
        raise RuntimeError("the layers' outputs are not finite: nothing would be compared")
    counts = []
    for call in (layers.captured(overlap=True), serial):
        wrong = torch.zeros((), dtype=torch.long, device=DEVICE)
        for turn in range(replays):
            # 3 is coprime to the number of inputs: each replay follows another input than the one before.
            index = 3 * turn % INPUTS
            wrong += (call(index) != expected[index]).any()
        counts.append(int(wrong))
    return counts[0], counts[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--slices", nargs="+", type=float, default=[0.0, 0.25])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--replays", type=int, default=500)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    record = Record("overlap", vars(options), DEVICE, options.json)
    for fraction in options.slices:
        config = first_layers(sliced_config(options.shape, fraction, "compact"), options.layers)
        for batch in options.batches:
            overlapped, serial = mismatches(Layers(config, batch, dtype), options.replays)
            record.rows.append(
                {
                    "shape": options.shape,
                    "slice": fraction,
                    "batch": batch,
                    "layers": options.layers,
                    "replays": options.replays,
                    "differ": overlapped,
                    "differ without overlap": serial,
                }
            )
            record.save()
    print_rows("overlap", record.rows)
    record.finish()
    sys.exit(any(row["differ"] or row["differ without overlap"] for row in record.rows))


if __name__ == "__main__":
    main()
