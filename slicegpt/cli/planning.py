"""`slicegpt slice --dry-run`: the plan of a run, from its config and options alone."""

import argparse
from pathlib import Path

from slicegpt.errors import SliceGPTError
from slicegpt.recipe import STOCK, Recipe

from .benchmark_options import PAPER_DEVICES
from .options import byte_size, check_device, positive, resolve_device

# Where a plan's memory is, as its table calls it.
_COLUMNS = {"device": "GPU", "host": "host", "disk": "disk"}


def add_planning(parser: argparse.ArgumentParser) -> None:
    """`--dry-run`, and what a run may take or a plan assumes."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would take: widths, size, memory by part, disk, time; no weight is read. MODEL may be "
        "the name of a shape, too: llama-2-70b, opt-66b, ...",
    )
    group.add_argument(
        "--device-memory",
        type=byte_size,
        metavar="SIZE",
        help="no more of the GPU's memory than this, such as 24GB; a plan may assume a GPU that is not here",
    )
    group.add_argument(
        "--host-memory", type=byte_size, metavar="SIZE", help="no more of the host's memory than this"
    )
    group.add_argument("--gpu", metavar="NAME", help=f"plan for a GPU: {', '.join(PAPER_DEVICES)}")
    group.add_argument("--ranks", type=positive, metavar="N", help="plan for N processes, one GPU each")
    parser.set_defaults(dry_run=False, device_memory=None, host_memory=None, gpu=None, ranks=None)


def check_planning(options: argparse.Namespace) -> None:
    """What belongs to a plan is given with one, and the output without."""
    if not options.dry_run:
        for name in ("gpu", "ranks"):
            if getattr(options, name) is not None:
                raise SliceGPTError("is for --dry-run, which is not given", name)
        if options.output is None:
            raise SliceGPTError("a folder to write is needed, got none", "output")
    if options.gpu is not None and options.gpu.lower() not in PAPER_DEVICES:
        raise SliceGPTError(f"must be one of {', '.join(PAPER_DEVICES)}, got {options.gpu!r}", "gpu")


def run_plan(options: argparse.Namespace, recipe: Recipe) -> None:
    """Print the plan, and write it as JSON where that is asked for."""
    check_device(options.device)
    content = plan_run(options, recipe)
    print(describe(content))
    if options.json:
        from slicegpt.table import write_json

        write_json(options.json, content)


def config_and_dtype(name: str, dtype):
    """The config of a dense model, and the dtype that it would be sliced in; no weight is read.

    Args:
        name: a shape, a folder, a .gguf file or a hub id.
        dtype: torch dtype that was asked for, or None.
    """
    import torch
    from transformers import AutoConfig

    from slicegpt.bench.models.architectures import MODELS
    from slicegpt.checkpoint.gguf import open_gguf
    from slicegpt.checkpoint.loading import load_errors, quiet_transformers, read_config

    path = Path(name)
    if name in MODELS and not path.exists():
        return MODELS[name], dtype or torch.float16
    with quiet_transformers():
        if path.suffix == ".gguf":
            config, own = open_gguf(path).config, torch.float32
        else:
            with load_errors(name):
                found = (
                    read_config(path, sliceable=True) if path.is_dir() else AutoConfig.from_pretrained(name)
                )
            config, own = found, found.dtype or torch.float32
        return config, dtype or own


def plan_run(options: argparse.Namespace, recipe: Recipe) -> dict:
    """The plan as plain values: size, memory by stage and part, operations and seconds."""
    from slicegpt.bench.models.architectures import fields_of_config
    from slicegpt.bench.models.devices import device_named
    from slicegpt.checkpoint.loading import quiet_transformers
    from slicegpt.checkpoint.record import size_record
    from slicegpt.conversion.size_plan import plan_recipe, settled
    from slicegpt.hardware.devices import find_dtype
    from slicegpt.hardware.memory import memory_limits
    from slicegpt.runtime.step_times import with_step_times
    from slicegpt.slicing.affordable import advice, best_budget, this_machine, workload_of
    from slicegpt.slicing.effort import effort_of, measured_rates, paper_rates
    from slicegpt.slicing.workload import Machine

    source, dtype = config_and_dtype(recipe.model, find_dtype(recipe.dtype))
    with quiet_transformers():
        fields = fields_of_config(source)
    paper = None if options.gpu is None else device_named(options.gpu)
    local = resolve_device(options.device)
    elsewhere = paper is not None or (options.device_memory is not None and local.type != "cuda")
    device = None if elsewhere else local
    recipe = recipe.override(dtype=str(dtype).removeprefix("torch."))
    recipe = settled(recipe, fields, device or "cuda")
    if device is None and recipe.target_speedup is not None and recipe.step_times is None:
        raise SliceGPTError("is measured on the device, which is not here; give step_times", "target_speedup")
    recipe = with_step_times(recipe, fields, dtype, device)
    config = plan_recipe(recipe, fields, dtype, source=source)
    size = size_record(config, dtype, source if recipe.form == STOCK else None)
    ranks = options.ranks or 1
    work = workload_of(recipe, dtype, device, options.activation_storage, ranks, timing=options.timing)
    with memory_limits(host=None):
        here = this_machine(local, Path(options.output).parent if options.output else None)
    known = None if paper is None else paper.memory * 2**30
    host = options.host_memory or here.host
    most = options.device_memory or known or here.device
    machine = Machine(most if work.on_gpu else host, host, here.disk)
    budget = best_budget(config, work, machine)
    effort, rates = effort_of(config, work), None
    if paper is not None:
        exact = paper.int8 * 1e12 / 9  # nine residues of bfloat16 activations, see `slicegpt.ops.gram`
        rates = paper_rates(paper.half * 1e12, paper.fp64 * 1e12, paper.name, exact)
    elif device is not None:
        rates = measured_rates(device, dtype)
    seconds = None if rates is None else effort.seconds(rates)
    return {
        "model": recipe.model,
        "recipe": {name: value for name, value in vars(recipe).items() if value is not None},
        "size": size,
        "widths": config.boundary_widths,
        "neurons": config.neurons,
        "key_value_heads": config.key_value_heads,
        "query_heads": config.attention_heads,
        "machine": {
            "device": machine.device if work.on_gpu else None,
            "host": host,
            "disk": here.disk,
            "ranks": ranks,
        },
        "activation_storage": budget.storage,
        "spills": budget.spills,
        "fits": budget.fits,
        "advice": None if budget.fits else advice(config, work, machine),
        "peak": {place: budget.peak(place) for place in _COLUMNS},
        "peak_stage": {place: budget.peak_stage(place).name for place in _COLUMNS},
        "parts": budget.parts(),
        "stages": {stage.name: stage.parts for stage in budget.stages},
        "operations": effort.stages,
        "rates": None if rates is None else vars(rates),
        "seconds": seconds,
        "disk_written": size["bytes"],
    }


def describe(content: dict) -> str:
    """The plan in words and tables."""
    from slicegpt.checkpoint.outcome import described_experts, summarise
    from slicegpt.modeling.sizes import describe_heads, describe_neurons, format_bytes
    from slicegpt.table import format_table

    size, peak, machine = content["size"], content["peak"], content["machine"]
    places = [place for place in _COLUMNS if peak[place]]
    title = content["model"]
    rows = [
        ("parameters", f"{size['parameters']:,} of {size['dense_parameters']:,} dense"),
        *described_experts(size),
        ("bytes", f"{format_bytes(size['bytes'])} in {content['recipe']['dtype']}"),
        ("widths", summarise(content["widths"])),
        (
            "neurons of an expert" if "experts" in size else "neurons of an MLP",
            describe_neurons(content["neurons"]),
        ),
        ("key/value heads", describe_heads(content["key_value_heads"])),
        ("query heads", describe_heads(content["query_heads"])),
        ("streams", f"on the {content['activation_storage']}"),
    ]
    facts = format_table([{"": name, title: value} for name, value in rows], ["", title])
    parts = [
        {"memory": part}
        | {_COLUMNS[place]: format_bytes(own[place]) if own.get(place) else "" for place in places}
        for part, own in content["parts"].items()
    ]
    named = ["memory", *(_COLUMNS[place] for place in places)]
    last = [
        {"memory": "peak"} | {_COLUMNS[place]: format_bytes(peak[place]) for place in places},
        {"memory": "during"} | {_COLUMNS[place]: content["peak_stage"][place] for place in places},
        {"memory": "there are"}
        | {_COLUMNS[place]: format_bytes(machine[place]) for place in places if machine[place] is not None},
    ]
    lines = [facts, format_table([*parts, *last], named)]
    if content["seconds"] is not None:
        times = [
            {"stage": stage, "time": duration(value)}
            for stage, value in sorted(content["seconds"].items(), key=lambda item: -item[1])
        ]
        times.append({"stage": "all", "time": duration(sum(content["seconds"].values()))})
        lines.append(
            format_table(times, ["stage", "time"]) + f"\nAn estimate: rates {content['rates']['source']}."
        )
    verdict = "The run fits." if content["fits"] else f"The run does not fit: {content['advice']}."
    return "\n\n".join([*lines, verdict])


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
