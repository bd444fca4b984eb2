"""The attention of a decoding step, `decode_attention_`, by this package's kernel and by PyTorch's operators.

    python -m slicegpt.bench.kernels.bench_attention --json results.json

One token for each sequence, with half-full caches; each layer has its own cache, so that none is still in L2. On a GPU
all layers are one CUDA graph, as in the runtime. "GB/s" counts the keys and values that must be read; PyTorch's
attention reads the whole capacity, under a mask.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import write_results
from slicegpt.bench.harness.timing import milliseconds_of, quantiles
from slicegpt.ops import decode_attention_
from slicegpt.ops.decode_attention import DISPATCHER

ON_GPU = torch.cuda.is_available()
LAYERS = 8


@dataclass(frozen=True)
class HeadShape:
    queries: int
    keys: int
    size: int


MODELS = {
    "llama-2-7b": HeadShape(32, 32, 128),
    "llama-2-70b": HeadShape(64, 8, 128),
    "phi-2": HeadShape(32, 32, 80),
    "gemma-2b": HeadShape(8, 1, 256),
}


def layers(
    heads: HeadShape, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """A function that runs every layer, each on its own rows and cache."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    columns = (2 * heads.keys + heads.queries) * heads.size
    rows = [normal(batch, columns) for _ in range(LAYERS)]
    cache = normal(LAYERS, 2, batch, heads.keys, capacity, heads.size)
    valid = torch.ones(batch, capacity, dtype=torch.bool, device=device)
    slot = torch.tensor([capacity // 2], device=device)
    cos, sin = normal(2, batch, 1, heads.size).clamp(-1, 1)

    def run() -> None:
        for row, (keys, values) in zip(rows, cache, strict=True):
            decode_attention_(row, keys, values, valid, slot, cos, sin, heads=heads.queries)

    return run


def replayed(run: Callable[[], None]) -> Callable[[], None]:
    """The same calls as one CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(
    name: str, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict]:
    """A row for every implementation available here, measured in turns."""
    heads, runs = MODELS[name], {}
    capability = torch.cuda.get_device_capability(device) if ON_GPU else None
    for backend in ("auto", "reference"):
        chosen = DISPATCHER.choose(backend, capability, dtype, heads.size)
        if chosen not in runs:
            os.environ["SLICEGPT_BACKEND"] = backend
            run = layers(heads, batch, capacity, dtype, device)
            runs[chosen] = replayed(run) if ON_GPU else run
    times: dict[str, list[float]] = {chosen: [] for chosen in runs}
    for turn in range(repeats + 2):
        for chosen, run in runs.items():
            elapsed = milliseconds_of(run, device) / LAYERS
            if turn >= 2:
                times[chosen].append(elapsed)
    read = 2 * batch * heads.keys * (capacity // 2) * heads.size * dtype.itemsize
    return [
        {
            "model": name,
            "batch": batch,
            "tokens": capacity // 2,
            "dtype": str(dtype).removeprefix("torch."),
            "by": chosen,
            "µs a layer": 1e3 * quantiles(milliseconds).median,
            "GB/s": read / quantiles(milliseconds).median / 1e6,
        }
        for chosen, milliseconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 2048, 16384] if ON_GPU else [128])
    parser.add_argument("--repeats", type=int, default=30 if ON_GPU else 5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    device = torch.device("cuda" if ON_GPU else "cpu")
    dtype = torch.bfloat16 if ON_GPU and torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    rows: list[dict] = []
    before = os.environ.get("SLICEGPT_BACKEND")
    try:
        for name in options.models:
            for batch in options.batch:
                for tokens in options.tokens:
                    rows += measure(name, batch, 2 * tokens, dtype, device, options.repeats)
                    write_results(options.json, "decode attention", {"rows": rows})
    finally:
        os.environ.pop("SLICEGPT_BACKEND", None)
        if before is not None:
            os.environ["SLICEGPT_BACKEND"] = before
    print_rows("decode attention", rows)


if __name__ == "__main__":
    main()
