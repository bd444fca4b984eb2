"""SparseGPT 2:4, the baseline of the SliceGPT paper, through the llm-compressor library.

The library pins its own transformers, so it may live in an environment of its own; `sparsegpt_worker.py` runs there,
as a program that needs nothing of this package.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration import CalibrationBatch
from slicegpt.checkpoint.loading import load_dense
from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress

WORKER = Path(__file__).with_name("sparsegpt_worker.py")
# In every line by which llm-compressor says that it begins with a matrix.
BEGINS = "Sparsifying"
INSTALL = "python -m venv sparsegpt && sparsegpt/bin/pip install llmcompressor"


def decoder_linears(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the linear layers inside the decoder layers, by name: what is pruned."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}."
    }


def check_interpreter(python: str) -> None:
    """One clear error where `python` cannot import llmcompressor."""
    try:
        done = subprocess.run([python, "-c", "import llmcompressor"], capture_output=True, text=True)
    except OSError as error:
        raise SliceGPTError(f"cannot run {python}: {error.strerror}", "python") from error
    if done.returncode:
        raise SliceGPTError(
            f"{python} has no llmcompressor (it pins its own transformers, so give it an "
            f"environment: {INSTALL}); got: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
            "python",
        )


def sparsegpt_2_4(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[CalibrationBatch],
    python: str = sys.executable,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Prune the decoder's linear layers to 2:4 with SparseGPT, calibrated on the same samples.

    Args:
        python: interpreter of an environment with llmcompressor.
        progress: counts matrices.

    Errors: `SliceGPTError` where it fails there, or what comes back is not 2:4 sparse.
    """
    with tempfile.TemporaryDirectory(prefix="sparsegpt-") as folder:
        dense, sparse = Path(folder, "dense"), Path(folder, "sparse")
        model.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        samples = [
            ids[mask.bool()]
            for batch in batches
            for ids, mask in zip(batch.input_ids.cpu(), batch.attention_mask.cpu(), strict=True)
        ]
        tokens = {f"{index:06}": ids.contiguous() for index, ids in enumerate(samples)}
        save_file(tokens, Path(folder, "samples.safetensors"))
        run_worker(python, folder, len(decoder_linears(model)), progress or Progress(quiet=True))
        pruned, _ = load_dense(str(sparse), model.dtype)
    check_2_4(pruned)
    return pruned


def run_worker(python: str, folder: str, matrices: int, progress: Progress) -> None:
    """Run `sparsegpt_worker.py` in `folder`; one clear error where it fails."""
    command, last, begun = [python, str(WORKER), folder], "no message", 0
    with progress.stage("sparsegpt-2:4", matrices, "matrices") as advance:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            for line in process.stdout:
                last = line.strip() or last
                if BEGINS in line:
                    if begun:
                        advance(1)
                    begun += 1
        if process.returncode:
            raise SliceGPTError(f"sparsegpt-2:4: llm-compressor failed: {last}")
        advance(matrices - max(0, begun - 1))


def check_2_4(model: PreTrainedModel) -> None:
    """Every four neighbours along a row of a decoder weight hold at least two zeros."""
    for name, weight in decoder_linears(model).items():
        kept = (weight.detach().unflatten(1, (-1, 4)) != 0).sum(dim=-1)
        if int(kept.max()) > 2:
            raise SliceGPTError(f"sparsegpt-2:4: {name} keeps {int(kept.max())} of 4 weights, expected 2")


def sparse_sizes(model: PreTrainedModel) -> dict:
    """True sizes of a 2:4 model: half of each pruned matrix, and 2 bits for the place of each number kept."""
    width = model.dtype.itemsize
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(weight.numel() for weight in decoder_linears(model).values()) // 2
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    places = pruned // 4
    return {
        "parameters": total - pruned,
        "bytes": (total - pruned) * width + places,
        "decoder_parameters": layers - pruned,
        "decoder_bytes": (layers - pruned) * width + places,
    }
