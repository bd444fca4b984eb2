"""Offline throughput of model folders on vLLM, measured in turns in one run.

    python -m slicegpt.bench.commands.bench_vllm dense-llama dense-canonical sliced-25 --json results.json

Every folder gets its own engine in its own process, `--repeats` times, in turns; each run serves the same prompts of
random token ids, greedily, after one warm-up. The first folder is the baseline: give the original checkpoint, which
vLLM runs with its own model code, or the dense model as `SlicedForCausalLM`, or both.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import write_results
from slicegpt.checkpoint.saving import stored_size

# Marks the line on which the child process prints its figures, among vLLM's logs.
MARK = "figures: "


def serve_once(options: argparse.Namespace, folder: str) -> dict:
    """Seconds of one offline run, the architecture and vLLM's version; called in a process of its own."""
    import vllm
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    engine = vllm.LLM(
        model=folder,
        dtype=options.dtype,
        max_model_len=options.input_tokens + options.output_tokens,
        max_num_seqs=options.requests,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        enforce_eager=options.eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (options.requests, options.input_tokens)
    ids = torch.randint(3, config.vocab_size, shape, generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]

    def run(tokens: int) -> float:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return seconds

    run(2)
    # Prompt and first token alone, then the whole run: the difference is decoding.
    return {
        "architecture": config.architectures[0],
        "prefill_seconds": run(1),
        "seconds": run(options.output_tokens),
        "vllm": vllm.__version__,
    }


def child(arguments: list[str], folder: str) -> dict:
    """`serve_once` in a new process, with the same options."""
    command = [sys.executable, "-m", "slicegpt.bench.commands.bench_vllm", *arguments, "--child", folder]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"{folder}: vLLM failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(MARK))


def summary(options: argparse.Namespace, folder: str, runs: list[dict]) -> dict:
    """The fastest run of a folder: tokens/s in total, and of decoding alone."""
    best = min(runs, key=lambda run: run["seconds"])
    tokens = options.requests * (options.input_tokens + options.output_tokens)
    decoded = options.requests * (options.output_tokens - 1)
    size = stored_size(folder)
    return {
        "model": Path(folder).name,
        "architecture": best["architecture"],
        "parameters": size.parameters,
        "bytes": size.bytes,
        "seconds": [run["seconds"] for run in runs],
        "prefill_seconds": [run["prefill_seconds"] for run in runs],
        "tokens_per_second": tokens / best["seconds"],
        "decode_tokens_per_second": decoded / min(run["seconds"] - run["prefill_seconds"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="DIR")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(f"\n{MARK}{json.dumps(serve_once(options, options.child))}")
        return
    if not options.models:
        parser.error("at least one DIR is needed")

    runs: dict[str, list[dict]] = {folder: [] for folder in options.models}
    arguments = [each for each in sys.argv[1:] if each not in options.models]
    for _ in range(options.repeats):
        for folder in options.models:
            runs[folder].append(child(arguments, folder))
    rows = [summary(options, folder, runs[folder]) for folder in options.models]
    for row in rows:
        row["speed-up"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    print(f"{options.requests} requests of {options.input_tokens} + {options.output_tokens} tokens")
    print_rows("vllm", rows)
    figures = {
        "vllm": next(iter(runs.values()))[0]["vllm"],
        "requests": options.requests,
        "input_tokens": options.input_tokens,
        "output_tokens": options.output_tokens,
        "dtype": options.dtype,
        "ranks": [options.tensor_parallel_size, options.pipeline_parallel_size],
        "compiled": not options.eager,
        "models": rows,
    }
    write_results(options.json, "vllm", figures)


if __name__ == "__main__":
    main()
