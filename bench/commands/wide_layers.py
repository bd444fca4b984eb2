"""`slicegpt bench memory`: what a run of slicing takes of the host's memory, beside what its plan says.

A model is sliced by `slicegpt slice` in a process of its own, whose peak the operating system tells: a checkpoint that
is there, or one of a known shape with few layers and random weights, which is written tensor by tensor. Nothing of a
layer's width depends on the number of layers.
"""

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedTokenizerFast

from slicegpt.bench.harness.record import Record
from slicegpt.bench.models.architectures import MODELS
from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.random_weights import NormalValues
from slicegpt.progress import Progress

# What has its own benchmarks of speed, and Mixtral 8x7B, whose config's defaults are its shape.
SHAPES = MODELS | {"mixtral-8x7b": MixtralConfig()}

# As most families initialise their weights.
DEVIATION = 0.02


def config_of(
    shape: str, layers: int, width: int | None = None, neurons: int | None = None
) -> PreTrainedConfig:
    """The configuration of a shape with so many layers, and of another width or number of neurons where given."""
    if shape not in SHAPES:
        raise SliceGPTError(f"--shape: must be one of {', '.join(SHAPES)}, got {shape!r}")
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if width is not None:
        config.num_attention_heads = max(1, width * config.num_attention_heads // config.hidden_size)
        config.num_key_value_heads = min(config.num_key_value_heads, config.num_attention_heads)
        config.hidden_size = width
    if neurons is not None:
        config.intermediate_size = neurons
    return config


def write_checkpoint(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, progress: Progress) -> int:
    """A checkpoint with random weights, one file a tensor, of which no two are in memory at once; returns its bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    normal, size, places = NormalValues(dtype, torch.device("cpu"), 0), 0, {}
    with progress.stage("writing random weights", len(shapes), "tensors") as advance:
        for number, (name, shape) in enumerate(shapes.items(), 1):
            tensor = torch.ones(shape, dtype=dtype)
            if len(shape) > 1:
                normal.fill(tensor, DEVIATION)
            elif name.endswith("bias"):
                tensor.zero_()
            places[name] = f"model-{number:05d}-of-{len(shapes):05d}.safetensors"
            save_file({name: tensor}, folder / places[name], {"format": "pt"})
            size += tensor.nbytes
            advance(1)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    words = Tokenizer(
        WordLevel({f"w{number}": number for number in range(config.vocab_size)}, unk_token="w0")
    )
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return size


# The process itself says what it took: the system's figure for a child includes what its parent had when it began.
_MEASURED = """
import sys
from pathlib import Path
file = Path(sys.argv.pop(1))
from slicegpt.cli import main
code = main()
from slicegpt.bench.harness.memory import resident_bytes
file.write_text(str(resident_bytes()[1]))
sys.exit(code)
"""


def run_measured(arguments: list[str]) -> tuple[int, float]:
    """Peak resident bytes and seconds of `slicegpt ARGUMENTS` in a process of its own.

    Raises:
        SliceGPTError: it failed; what it said last.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        peak = Path(folder, "peak")
        command = [sys.executable, "-c", _MEASURED, str(peak), *arguments]
        process = subprocess.run(command, stdout=said, stderr=said)
        said.seek(0)
        lines = said.read().strip().splitlines()
        most = int(peak.read_text()) if peak.is_file() else 0
    if process.returncode:
        raise SliceGPTError(
            f"slicegpt {' '.join(arguments)} failed: {lines[-1] if lines else process.returncode}"
        )
    return most, time.perf_counter() - began


def measure_shape(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    slicing: list[str],
    folder: Path,
    record: Record,
    progress: Progress,
) -> None:
    """`measure_memory` of random weights of a configuration, which are written to `folder` and removed."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        size = write_checkpoint(Path(scratch), config, dtype, progress)
        facts = {
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "checkpoint_bytes": size,
        }
        # Its tokenizer knows no text.
        measure_memory(scratch, facts, ["--calibration", "random-tokens", *slicing], folder, record, progress)


def measure_model(name: str, slicing: list[str], folder: Path, record: Record, progress: Progress) -> None:
    """`measure_memory` of a checkpoint as `slicegpt slice` takes it."""
    with progress.step("opening the model"):
        source = open_dense(name, sliceable=True)
    facts = {
        "model": Path(name).name,
        "width": source.config.hidden_size,
        "layers": source.config.num_hidden_layers,
        "checkpoint_bytes": source.total_bytes,
    }
    measure_memory(name, facts, slicing, folder, record, progress)


def measure_memory(
    name: str,
    facts: dict[str, str | int],
    slicing: list[str],
    folder: Path,
    record: Record,
    progress: Progress,
) -> None:
    """Plan, slice on the CPU and compare; `record.rows` holds one row.

    Args:
        name: of the dense model.
        facts: about it, which the row begins with.
        slicing: options of `slicegpt slice`, a size among them.
        folder: for the sliced model, which is removed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        planned = Path(scratch, "plan.json")
        common = ["slice", name, "--device", "cpu", *slicing]
        with progress.step("planning"):
            run_measured([*common, "--output", f"{scratch}/none", "--dry-run", "--json", str(planned)])
        plan = json.loads(planned.read_text(encoding="utf-8"))
        with progress.step("slicing"):
            peak, seconds = run_measured([*common, "--output", f"{scratch}/sliced"])
        written = sum(file.stat().st_size for file in Path(scratch, "sliced").glob("*.safetensors"))
    row = facts | {
        "sliced_bytes": written,
        "peak_bytes": peak,
        "planned_bytes": plan["peak"]["host"],
        "planned_over_measured": plan["peak"]["host"] / peak,
        "seconds": seconds,
        "planned_seconds": math.fsum(plan["seconds"].values()),
    }
    record.content["plan"] = plan
    record.save(complete=True, rows=[row])
