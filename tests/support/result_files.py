"""Result files of every kind that a command writes, as small as they can be."""

import json
from pathlib import Path

ENVIRONMENT = {
    "device": "Some <CPU>",
    "driver": None,
    "threads": 2,
    "load_average": 0.1,
    "versions": {"torch": "2.13.0", "cuda": None},
    "commit": "abc123",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "slicegpt bench token --slice 0,0.25",
}
NETWORKS = {"dense": {"slice": 0.0, "bytes": 8_000_000}, "sliced 25 %": {"slice": 0.25, "bytes": 6_000_000}}


def of_kind(kind: str, **figures) -> dict:
    return {"benchmark": kind, "complete": True, "environment": ENVIRONMENT} | figures


def token_content() -> dict:
    """Sliced 25 %, fused: 750 tokens/s over 500 dense, where the bytes allow 4/3."""
    rows = [
        {
            "network": network,
            **facts,
            "engine": engine,
            "batch": 1,
            "dtype": "float32",
            "dense_parameters": 2_000_000,
            "read_bytes": facts["bytes"],
            "ms_median": 2.0,
            "ms_p10": 1.5,
            "ms_p90": 2.5,
            "tokens_per_second": 750.0 if (network, engine) == ("sliced 25 %", "fused") else 500.0,
            "bandwidth_fraction": None,
            "speedup": 1.5,
        }
        for network, facts in NETWORKS.items()
        for engine in ("plain", "fused")
    ]
    return of_kind(
        "token",
        complete=False,
        settings={"model": ["folder/some-model"]},
        baseline="Best dense baseline: fused.",
        skipped=[{"network": "dense", "engine": "hf-compile", "skipped": "no compiler"}],
        rows=rows,
    )


def throughput_content() -> dict:
    points = [
        {"network": network, "engine": "fused", "batch": batch, "tokens_per_second": 100.0 * batch}
        for network in NETWORKS
        for batch in (1, 2, 4, 3)
    ]
    rows = [
        {
            "network": network,
            **facts,
            "engine": "fused",
            "dtype": "float32",
            "dense_parameters": 2_000_000,
            "batch": 4,
            "tokens_per_second": 400.0,
            "reason": "out of memory at batch 8",
        }
        for network, facts in NETWORKS.items()
    ]
    return of_kind("throughput", settings={"shape": "llama-1b"}, rows=rows, points=points)


def layers_content() -> dict:
    operations = {"attention norm": 0.5, "q": 1.0, "out": 2.0, "MLP shortcut": 0.5}
    fused = {"norm + q + k + v": 1.0, "norm + gate + up + activation": 2.0, "down + shortcut": 0.25}
    rows = [
        {"variant": "dense, Hugging Face", "operations": {}, "layer_ms": 5.0, "agrees": None},
        {
            "variant": "dense, unfused",
            "operations": operations,
            "layer_ms": 4.0,
            "total_ms": 4.0,
            "agrees": True,
        },
        {"variant": "dense, fused", "operations": fused, "layer_ms": 2.0, "total_ms": 3.25, "agrees": False},
    ]
    return of_kind("layers", rows=rows)


def attention_content() -> dict:
    row = {"model": "llama-2-7b", "batch": 1, "tokens": 2048, "dtype": "bfloat16", "GB/s": 900.0}
    return of_kind(
        "decode attention",
        rows=[row | {"by": "reference", "µs a layer": 30.0}, row | {"by": "triton", "µs a layer": 12.0}],
    )


def speculative_content() -> dict:
    row = {
        "draft": "alone",
        "accepted": "",
        "tokens a pass": 1.0,
        "tokens/s": 20.0,
        "ratio": 1.0,
        "differing": 0,
    }
    drafted = {"draft": "draft-80", "accepted": "61.0%", "tokens a pass": 2.5, "tokens/s": 26.0, "ratio": 1.3}
    return of_kind("speculative", options={"dense": "some-model"}, rows=[row, row | drafted])


def predict_content() -> dict:
    row = {"model": "llama-2-7b", "slice": 0.0, "width": 4096, "GB": 13.5, "GPUs": 1, "fits": True}
    row |= {"ms per token": 4.0, "GPU-ms per token": 4.0, "largest batch": 512, "tokens/s": 20_000.0}
    return of_kind("predict", rows=[row, row | {"slice": 0.25, "ms per token": 3.2}], notes=["Assumed."])


def published_content() -> dict:
    row = {
        "device": "A100",
        "model": "llama-2-70b",
        "slice": 0.0,
        "ms published": 125.0,
        "ms predicted": 128.0,
    }
    return of_kind(
        "published",
        efficiencies={"A100": 0.5},
        **{"time per token": [row | {"error %": 2.4}, row | {"error %": -5.1}]},
    )


def kernels_content() -> dict:
    """As pytest-benchmark writes it."""
    each = {"name": "test_gram[D576-published]", "stats": {"median": 0.0012, "min": 0.001, "rounds": 3}}
    machine = {"cpu": {"brand_raw": "Some CPU"}, "python_version": "3.12.1", "machine": "x86_64"}
    commit = {"id": "abc123"}
    return {
        "machine_info": machine,
        "commit_info": commit,
        "benchmarks": [each],
        "datetime": "2026-01-02T03:04:05",
    }


def tuned_content() -> dict:
    entry = {"op": "norm_linear", "dtype": "bfloat16", "rows": 32, "columns": 4096, "inner": 4096}
    entry |= {"config": {"block_m": 64, "block_n": 128}, "microseconds": 12.5}
    return {
        "device": "Some GPU",
        "versions": {"torch": "2.13.0"},
        "date": "2026-01-02",
        "commit": "abc123",
    } | {"entries": [entry]}


SIZE = {"parameters": 900, "dense_parameters": 1000, "bytes": 3600, "dense_bytes": 4000, "removed": 0.1}
BOUNDARIES = [
    {"width": 40, "rank": 8, "shortcut": "compact"},
    {"width": 48, "rank": None, "shortcut": "dense"},
    {"width": 48, "rank": 0, "shortcut": "none"},
]


def record_content() -> dict:
    """As `slicing.json`."""
    return {
        "source": "some-model",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "dtype": "float32",
        "dense_width": 48,
        "neurons": [60, 72],
        "dense_neurons": 80,
        "slicing": 0.1,
        "refit": [{"block": 0, "ridge": 0.1}],
        "ridge_search": None,
        "size": SIZE,
        "boundaries": BOUNDARIES,
        "calibration": {"tokens": 5120, "source": "text.txt", "warnings": []},
        "seconds": {"signals": 1.5, "refit": 2.5},
        "eigenvalues": [[1.0, 0.5], None],
        "perplexity": {"dense": 12.0, "sliced": 13.0},
    }


def info_content() -> dict:
    """As `slicegpt info --json`."""
    facts = {"model": "sliced", "family": "llama", "dtype": "float32", **SIZE, "slicing": 0.1, "layers": 2}
    facts |= {"dense_width": 48, "neurons": 72, "dense_neurons": 80, "tied_head": False, "calibration": None}
    return facts | {"boundaries": BOUNDARIES}


def evaluation_content() -> dict:
    """As `slicegpt eval --json` of two models."""
    dense = {"model": "dense", "parameters": 1000, "dtype": "float32", "perplexity": 12.0, "tokens": 2044}
    dense |= {"seconds": 1.5, "tasks": {"piqa": {"questions": 9, "acc": 0.5}}, "mean_accuracy": 0.5}
    return dense | {
        "data": "text.txt",
        "seqlen": 512,
        "models": [dense, dense | {"model": "sliced", "perplexity": 13.5}],
    }


def finetuning_content() -> dict:
    """As `slicegpt finetune --json`."""
    counts = {"best_step": 20, "steps": 30, "tokens": 1000, "trained_parameters": 500, "seconds": 12.5}
    return {"output": "tuned", "loss_before": 4.0, "loss_after": 3.5} | counts


def environment_content() -> dict:
    """As `slicegpt env --json`."""
    return {
        "versions": {"torch": "2.13.0", "triton": None},
        "platform": "Linux",
        "threads": 2,
        "devices": [{"device": "cuda:0", "name": "Some GPU", "capability": "9.0", "memory": 10**11}],
        "kernels": {"cpu part": "slicegpt._cpu 0.1.0"},
        "extras": {"plot": True, "vllm": False},
    }


def demo_content() -> dict:
    """As `slicegpt demo --json` writes it; 40 ms a token are 25 tokens/s."""
    row = {"model": "dense", "parameters": 1000, "bytes": 4000, "perplexity": 13.4, "tokens": 100}
    row |= {
        "ms per token": 40.0,
        "text": "The for statement is used to iterate over the elements of a sequence.",
    }
    return {"models": [row, row | {"model": "90 % of parameters", "perplexity": 14.1}], "seconds": 120.5}


def timed_demo_content() -> dict:
    """As a demo that times the runtime beside Hugging Face's generate()."""
    row = {
        "model": "dense",
        "engine": "generate()",
        "bytes": 4000,
        "perplexity": 13.4,
        "tokens_per_second": 20.0,
    }
    fused = {"engine": "runtime", "tokens_per_second": 44.0, "speedup": 2.2}
    small = {"model": "90 % of parameters", "bytes": 3600, "perplexity": 14.1, "text": "The for statement"}
    rows = [row | {"speedup": 1.0}, row | fused, row | fused | small]
    return of_kind("demo", settings={"model": "some-model"}, rows=rows, seconds=120.5, notes=["On a text."])


def generation_content() -> dict:
    return {"prompt": "The for", "text": " statement", "tokens": 12, "seconds": 0.5, "runtime": "fused"}


def frontier_content() -> dict:
    """As `frontier.json` of `slicegpt frontier`."""
    point = {"method": "dense", "widths": "576", "options": {}, "parameters": 1000, "bytes": 4000}
    point |= {
        "decoder_parameters": 800,
        "decoder_bytes": 3200,
        "nll": {"text": 2.5},
        "perplexity": {"text": 12.2},
    }
    ours = {
        "method": "ours",
        "widths": "560; 1200 neurons",
        "parameters": 900,
        "bytes": 3600,
        "decoder_bytes": 2800,
    }
    settings = {"model": "some-model", "dtype": "float32", "texts": [{"name": "text", "windows": 4}]}
    return {
        "settings": settings,
        "versions": {"torch": "2.13.0"},
        "points": [point, point | ours | {"perplexity": {"text": 13.0}}],
    }


def conversation_content() -> dict:
    """As `slicegpt generate --chat --json`."""
    messages = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A sequence."},
    ]
    return {"messages": messages, "runtime": "fused"}


def memory_content() -> dict:
    row = {
        "width": 512,
        "layers": 2,
        "checkpoint_bytes": 40_000_000,
        "sliced_bytes": 32_000_000,
        "peak_bytes": 1_200_000_000,
        "planned_bytes": 1_260_000_000,
        "planned_over_measured": 1.05,
        "seconds": 12.5,
        "planned_seconds": 10.0,
    }
    return of_kind("memory", settings={"shape": "llama-2-70b"}, rows=[row])


def ranks_content() -> dict:
    rows = [{"ranks": ranks, "slicing": 60.0 / ranks, "in all": 80.0 / ranks} for ranks in (1, 2)]
    return of_kind("ranks", settings={"model": "some-model"}, rows=rows, speedup=2.0, weights_apart=1e-3)


def kills_content() -> dict:
    kill = {"killed after": 3.2, "stage": "slicing", "blocks": 4, "lost": 0.7, "same weights": True}
    figures = {"seconds": 40.0, "first_snapshot": 2.0, "longest_gap": 0.9, "sha256": "abc", "seed": 7}
    return of_kind("resume_kills", **figures, kills=[kill, kill | {"killed after": 9.0}])


def ceilings_content() -> dict:
    copy = {"ceiling": "copy", "value": 4.2, "unit": "TB/s", "reason": None}
    return of_kind(
        "ceilings", rows=[copy, {"ceiling": "DSYRK", "value": None, "unit": None, "reason": "no CuPy"}]
    )


def overlap_content() -> dict:
    row = {"shape": "llama-2-7b", "slice": 0.25, "batch": 1, "layers": 2, "replays": 50}
    return of_kind("overlap", rows=[row | {"differ": 0, "differ without overlap": 0}])


def speedup_content() -> dict:
    row = {"dtype": "bfloat16", "batch": 1, "asked": 1.3, "columns": 576, "neurons": 792, "planned": 1.3}
    rates = {"measured": 1.32, "dense tokens/s": 63.0, "sliced tokens/s": 83.5}
    return of_kind("speedup", settings={"shape": "smollm2-135m"}, rows=[row | rates])


def planes_content() -> dict:
    row = {"model": "some-model", "signal": "stream", "dtype": "bfloat16", "tokens": 2048, "columns": 576}
    return of_kind("planes", rows=[row | {"planes": 6.3, "least": 5.9, "most": 7.1, "of Gaussians": 8.2}])


def rehearsal_content() -> dict:
    row = {"phase": "1", "killed after": 3.5, "seconds": 3.6, "steps": 4, "lost": 0, "status": None}
    return of_kind("rehearsal", rows=[row])


def plans_content() -> dict:
    row = {"size": 0.8, "plan": "exchange", "width": 576, "neurons": 1126, "kv_groups": 2.7, "kept": 0.799}
    layers = {"layers": {"neurons": [1536, 716], "kv_groups": [3, 2]}, "seconds": 60.0}
    rows = [row | layers | {"measured": 0.395}, row | layers | {"plan": "neurons", "measured": 0.505}]
    return of_kind("plans", settings={"model": "some-model"}, rows=rows)


# Kind -> a file of it. Those that bench/results/ holds are tested as they are.
UNRECORDED = {
    "decode attention": attention_content,
    "speculative": speculative_content,
    "predict": predict_content,
    "published": published_content,
    "kernels": kernels_content,
    "memory": memory_content,
    "ranks": ranks_content,
    "resume_kills": kills_content,
    "ceilings": ceilings_content,
    "overlap": overlap_content,
    "speedup": speedup_content,
    "planes": planes_content,
    "rehearsal": rehearsal_content,
    "plans": plans_content,
    "tuned": tuned_content,
    "slicing record": record_content,
    "model": info_content,
    "evaluation": evaluation_content,
    "finetuning": finetuning_content,
    "environment": environment_content,
    "demo": demo_content,
    "generation": generation_content,
    "conversation": conversation_content,
}


def write_unrecorded(folder: Path) -> None:
    """One file of each of those kinds, named after it, a frontier that is not merged, and a demo with the runtime."""
    others = {"own frontier": frontier_content, "timed demo": timed_demo_content}
    for kind, make in (UNRECORDED | others).items():
        (folder / f"{kind.replace(' ', '-')}.json").write_text(json.dumps(make()), encoding="utf-8")
