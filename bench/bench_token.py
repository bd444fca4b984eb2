"""Time per token at batch 1: Hugging Face's `generate` with both of its caches, and the runtime, dense and sliced.

    python -m slicegpt.bench.bench_token smollm2-135m --json results.json
    python -m slicegpt.bench.bench_token --shape llama-1b --dtype bfloat16

The methods take turns, a run of tokens each, so that a change of clocks or of other load meets all of them. "bytes"
are the weights that a token reads, head included, at their own size (both copies of a compact factor count); GB/s is
that over the median. The sliced model has random weights at the shape that slicing gives; a named shape has random
weights throughout.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from slicegpt.bench.models import MODELS, sliced_config
from slicegpt.bench.results import write_results
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.loading import load_dense
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.runtime import Runtime
from slicegpt.schedule import Shape, constant_widths, plan, width_for_slice
from slicegpt.table import format_table

PROMPT_TOKENS = 16
COLUMNS = ["dtype", "method", "ms/token", "p10", "p90", "tokens", "MB/token", "GB/s"]


class Clock(BaseStreamer):
    """The times at which `generate` hands over a token (the prompt comes first)."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


# --- methods: seconds between the tokens of one run -----------------------------------------------------------


def hugging_face(model: PreTrainedModel, cache: str) -> Callable[[torch.Tensor, int], list[float]]:
    def run(ids: torch.Tensor, tokens: int) -> list[float]:
        clock = Clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens + 1,
            min_new_tokens=tokens + 1,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            streamer=clock,
        )
        return intervals(clock.times[1:])

    return run


def fused(runtime: Runtime) -> Callable[[torch.Tensor, int], list[float]]:
    def run(ids: torch.Tensor, tokens: int) -> list[float]:
        stream = runtime.stream(ids, max_new_tokens=tokens + 1, ignore_eos=True)
        return intervals([time.perf_counter() for _ in stream])

    return run


def intervals(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def weights_of(model: PreTrainedModel) -> int:
    """Bytes that a token reads: all parameters but the embedding table, which counts where it is the head too."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    unread = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - unread


# --- models ---------------------------------------------------------------------------------------------------


def models(
    options: argparse.Namespace, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[torch.Tensor, int], list[float]], int]]:
    """(name, method, bytes a token reads)."""
    if options.shape:
        dense = filled(lambda: AutoModelForCausalLM.from_config(MODELS[options.shape]), dtype, device)
        # Packed from a model of the same shape: folding norms of random weights would change nothing.
        canonical = filled(lambda: SlicedForCausalLM(sliced_config(options.shape, 0)), dtype, device)
        runtime = Runtime(canonical, release=True)
        del canonical
        config = sliced_config(options.shape, options.slice, round_to=options.round_to)
    else:
        dense, _ = load_dense(options.model, dtype, device)
        runtime = Runtime(dense)
        config = sliced_shape(dense, options)
    dense.generation_config.eos_token_id = None
    for cache in ("dynamic", "static"):
        yield f"Hugging Face, {cache} cache", hugging_face(dense, cache), weights_of(dense)
    yield "runtime, dense", fused(runtime), runtime.bytes_per_token()
    sliced = Runtime(filled(lambda: SlicedForCausalLM(config), dtype, device), release=True)
    yield f"runtime, {100 * options.slice:g} % sliced", fused(sliced), sliced.bytes_per_token()


@torch.no_grad()
def filled(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype, device: str, block: int = 1 << 20
) -> PreTrainedModel:
    """A model with weights of one block of normal numbers over and over: made at the speed of memory."""
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device).eval()
    model.tie_weights()
    values = 0.02 * torch.randn(block, generator=torch.Generator().manual_seed(0))
    values = values.to(device, dtype)
    for parameter in model.parameters():
        for piece in parameter.view(-1).split(block):
            piece.copy_(values[: len(piece)])
    base = model.base_model  # frequencies are computed, not stored
    if getattr(base, "rotary_emb", None) is not None:
        base.rotary_emb = type(base.rotary_emb)(model.config).to(device)
    return model


def sliced_shape(dense: PreTrainedModel, options: argparse.Namespace) -> SlicedConfig:
    fields = canonical_fields(dense)
    width = width_for_slice(fields["dense_hidden_size"], options.slice, options.round_to)
    return plan(fields, constant_widths(fields, width), Shape(round_to=options.round_to))


def measure(options: argparse.Namespace, dtype: torch.dtype, device: str) -> list[dict]:
    methods = list(models(options, dtype, device))
    ids = torch.randint(3, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    times: dict[str, list[float]] = {name: [] for name, _, _ in methods}
    for round_index in range(options.rounds + 1):  # the first warms up
        for name, run, _ in methods:
            seconds = run(ids, options.tokens if round_index else 4)
            if round_index:
                times[name] += seconds
    rows = []
    for name, _, size in methods:
        deciles = statistics.quantiles(times[name], n=10)
        median = statistics.median(times[name])
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "method": name,
                "ms/token": 1e3 * median,
                "p10": 1e3 * deciles[0],
                "p90": 1e3 * deciles[-1],
                "tokens": len(times[name]),
                "MB/token": size / 1e6,
                "GB/s": size / median / 1e9,
            }
        )
    return rows


def ratios(rows: list[dict]) -> dict:
    """The dense runtime against Hugging Face's faster cache, and what slicing gains against what its bytes allow."""
    dynamic, static, dense, sliced = rows
    return {
        "dtype": dense["dtype"],
        "dense runtime over Hugging Face": min(dynamic["ms/token"], static["ms/token"]) / dense["ms/token"],
        "sliced over dense runtime": dense["ms/token"] / sliced["ms/token"],
        "ratio of bytes": dense["MB/token"] / sliced["MB/token"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a model as `slicegpt slice` takes it")
    parser.add_argument("--shape", choices=MODELS, help="random weights of this model's shape instead")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--slice", type=float, default=0.25)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of one run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if (options.model is None) == (options.shape is None):
        raise SliceGPTError("bench_token: give a model or --shape, one of them")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, summary = [], []
    for name in options.dtype:
        measured = measure(options, getattr(torch, name), device)
        rows += measured
        summary.append(ratios(measured))
    print(format_table(rows, COLUMNS))
    print()
    print(format_table(summary, list(summary[0])))
    settings = {
        "model": options.shape or options.model,
        "slice": options.slice,
        "threads": torch.get_num_threads(),
    }
    write_results(options.json, "time per token", settings | {"rows": rows, "ratios": summary})


if __name__ == "__main__":
    main()
