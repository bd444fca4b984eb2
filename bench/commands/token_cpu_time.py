"""Processor time of one thread per token, engines in turns: for a machine that other work shares.

    python -m slicegpt.bench.commands.token_cpu_time MODEL --gguf FILE,... [--prompt 64] [--json FILE]

The time in which a thread waits for a core does not count, so that load matters only through the memory and the caches
that it takes. `slicegpt bench token` measures what a user waits for, on all threads, and wants a quiet machine.
"""

import argparse
import time

import torch

from slicegpt.bench.harness.display import print_summary
from slicegpt.bench.harness.record import Record
from slicegpt.bench.harness.timing import quantiles
from slicegpt.bench.models.engines import benchmark_cases, chosen_engines, start_decoder
from slicegpt.bench.models.networks import choose_networks

ENGINES = "fused,fused-int8,fused-int4,llama-cpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a dense model or a sliced folder")
    parser.add_argument("--gguf", type=_names, default=[], help="files of the dense model for llama.cpp")
    parser.add_argument("--engines", type=_names, default=ENGINES.split(","))
    parser.add_argument(
        "--prompt", type=int, default=64, help="tokens of the prompt, read once before it is timed"
    )
    parser.add_argument("--tokens", type=int, default=3, help="timed ones of a turn")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each engine")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    networks = choose_networks([options.model], None, [0.0], [torch.bfloat16], device)
    cases, _ = benchmark_cases(networks, chosen_engines(options.engines, options.gguf))
    ids = torch.arange(options.prompt)[None] + 100
    decoders, prompts, times = [], [], [[] for _ in cases]
    for case in cases:
        decoder = start_decoder(case, 1, options.prompt + options.rounds * (options.tokens + 1) + 1)
        decoder.prompt(ids)
        prompts.append(_milliseconds(lambda decoder=decoder: decoder.prompt(ids)))
        decoders.append(decoder)
    for _ in range(options.rounds):
        for decoder, own in zip(decoders, times, strict=True):
            decoder.step()  # brings what the others have displaced
            own += [_milliseconds(decoder.step) for _ in range(options.tokens)]
    record = Record(
        "token", vars(options) | {"model": [options.model], "clock": "thread"}, device, options.json
    )
    rows = []
    for case, decoder, prompt, own in zip(cases, decoders, prompts, times, strict=True):
        seen = quantiles(own)
        rows.append(
            case.network.facts()
            | {
                "engine": case.engine.name,
                "batch": 1,
                "tokens": len(own),
                "bytes": decoder.stored_bytes,
                "ms_median": seen.median,
                "ms_p10": seen.p10,
                "ms_p90": seen.p90,
                "tokens_per_second": 1000 / seen.median,
                "prompt_ms": prompt,
                "read_bytes": decoder.weight_bytes,
                "gigabytes_per_second": decoder.weight_bytes / seen.median / 1e6,
            }
        )
    record.save(rows=rows)
    record.finish()
    print_summary(record.content)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _milliseconds(run) -> float:
    began = time.thread_time()
    run()
    return 1000 * (time.thread_time() - began)


if __name__ == "__main__":
    main()
