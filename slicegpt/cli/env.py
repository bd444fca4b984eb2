"""`slicegpt env`: which kernels, devices and versions there are."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform

from .options import add_json

EXTRAS = {
    "hub": ("datasets",),
    "gguf": ("gguf", "accelerate"),
    "parquet": ("pyarrow",),
    "plot": ("matplotlib",),
    "vllm": ("vllm",),
    "eval": ("lm_eval",),
    "finetune": ("peft", "accelerate"),
}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "env",
        help="which kernels, devices and versions there are",
        description="What this installation has: versions, devices, compiled kernels, optional extras.",
        examples=("slicegpt env", "slicegpt env --json env.json"),
    )
    parser.set_defaults(run=run)
    add_json(parser)


def describe() -> dict:
    """Versions, devices, kernels and extras of this installation."""
    import torch

    from slicegpt.checkpoint.record import versions
    from slicegpt.ops.cpu import extension as cpu_extension
    from slicegpt.ops.cuda import extension as cuda_extension

    packages = {}
    for name in ("triton", "safetensors", "tokenizers", "numpy"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    devices = [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
            "memory": torch.cuda.get_device_properties(index).total_memory,
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "versions": versions() | packages | {"cuda (torch)": torch.version.cuda},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "kernels": cuda_extension.build_info()
        | cpu_extension.build_info()
        | {"backend": os.environ.get("SLICEGPT_BACKEND", "auto")},
        "extras": {
            extra: all(importlib.util.find_spec(module) is not None for module in modules)
            for extra, modules in EXTRAS.items()
        },
    }


def run(options: argparse.Namespace) -> None:
    from slicegpt.table import write_json

    facts = describe()
    print(described(facts))
    if options.json:
        write_json(options.json, facts)


def described(facts: dict) -> str:
    """`describe`'s facts as paragraphs of names and values."""
    from slicegpt.modeling.sizes import format_bytes
    from slicegpt.table import format_facts

    versions = dict(facts["versions"])
    top = [(name, versions.pop(name)) for name in ("slicegpt", "python")]
    top.append(("platform", f"{facts['platform']}, threads: {facts['threads']}"))
    devices = [
        (
            each["device"],
            f"{each['name']}, sm_{each['capability'].replace('.', '')}, {format_bytes(each['memory'])}",
        )
        for each in facts["devices"]
    ] or [("cuda devices", "none")]
    extras = [
        (f"extra {extra}", "installed" if there else f'missing: pip install "slicegpt[{extra}]"')
        for extra, there in facts["extras"].items()
    ]
    packages = [(name, version or "not installed") for name, version in versions.items()]
    parts = (top, packages, devices, list(facts["kernels"].items()), extras)
    label = max(len(name) for part in parts for name, _ in part)
    # One column of names for all of them: the paragraphs stand below each other.
    return "\n\n".join(format_facts([(name.ljust(label), value) for name, value in part]) for part in parts)
