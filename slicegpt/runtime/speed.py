"""Tokens/s of `Runtime`, several models in turns: a look of a few seconds; `slicegpt bench token` takes its time."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt.errors import SliceGPTError, first_line
from slicegpt.families import DenseSource
from slicegpt.hardware.memory import free_memory
from slicegpt.hardware.offload import moved
from slicegpt.progress import Progress
from slicegpt.runtime.engine import Runtime

logger = logging.getLogger("slicegpt")

PROMPT = 16  # tokens
TOKENS = 16  # of a turn
TURNS = 5
SECONDS = 2.0  # no further turn after so many
WARM_UP = 2  # tokens of the first turn, which is not counted
# Of both models together: in float32, at 10 GB/s, a token of each takes a quarter of a second, and a turn four of them.
CPU_PARAMETERS = 600_000_000


def tokens_per_second(
    models: Sequence[PreTrainedModel],
    input_ids: Tensor,
    tokens: int = TOKENS,
    turns: int = TURNS,
    seconds: float = float("inf"),
) -> list[float]:
    """Median tokens/s of each model while decoding, taking turns, so that other load meets them all alike.

    Args:
        models: sliced ones, or dense ones of a supported family, on the device of `input_ids`. They are not changed;
            each is packed into a second copy.
        input_ids: the prompt [batch, tokens], whose reading is not counted; the tokens/s are of one row.
        tokens: that are timed in each turn.
        turns: of each model, after one that warms up.
        seconds: no further turn once the timed ones have taken so long; one at least is taken.
    """
    length = input_ids.shape[1] + tokens + 1
    runtimes = [Runtime(model, max_length=length) for model in models]
    return [statistics.median(own) for own in timed_in_turns(runtimes, input_ids, tokens, turns, seconds)]


def timed_in_turns(
    runtimes: Sequence[Runtime], input_ids: Tensor, tokens: int, turns: int, seconds: float
) -> list[list[float]]:
    """Tokens/s of every turn of each runtime; the arguments are those of `tokens_per_second`."""
    rates: list[list[float]] = [[] for _ in runtimes]
    spent = 0.0
    for turn in range(turns + 1):
        if turn > 1 and spent >= seconds:
            break
        for runtime, own in zip(runtimes, rates, strict=True):
            new_tokens = 1 + (tokens if turn else min(WARM_UP, tokens))
            stream = runtime.stream(input_ids, max_new_tokens=new_tokens, ignore_eos=True)
            next(stream)
            start = time.perf_counter()
            count = sum(1 for _ in stream)
            took = time.perf_counter() - start
            if turn:
                own.append(count / took)
                spent += took
    return rates


def compare_speed(
    dense: PreTrainedModel | DenseSource | None,
    sliced: PreTrainedModel | DenseSource,
    input_ids: Tensor,
    device: torch.device,
    progress: Progress,
) -> dict:
    """Tokens/s of the dense and of the sliced model, one sequence at a time: what `slicing.json` says of speed.

    Never an error, and never more than a few seconds: what a run of slicing has made is worth more than this figure.

    Args:
        dense, sliced: a source that is not loaded is loaded where there is room; None: not measured.
        input_ids: tokens [n] to take a prompt from.
        device: where both are brought, and back.

    Returns:
        `dense` and `sliced`, None where it was not measured; then `note` says why. `device`, `threads` of a CPU.
    """
    found: dict = {"dense": None, "sliced": None, "device": device.type}
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    if dense is None:
        found["note"] = "the dense model was not at hand"
    models = [model for model in (dense, sliced) if model is not None]
    if reason := _too_large(models, device):
        return found | {"note": reason}
    prompt = input_ids[None, :PROMPT].to(device)
    room = sliced.config.max_position_embeddings - prompt.shape[1] - 1
    try:
        with ExitStack() as stack, progress.step("tokens/s, dense and sliced"):
            loaded = [model.load() if isinstance(model, DenseSource) else model for model in models]
            for model in loaded:
                stack.enter_context(moved(model, device))
            rates = tokens_per_second(loaded, prompt, min(TOKENS, room), seconds=SECONDS)
    except (SliceGPTError, RuntimeError) as error:  # torch's running out of memory is a RuntimeError
        logger.warning("tokens/s were not measured: %s", first_line(error))
        return found | {"note": first_line(error)}
    found["sliced"] = rates[-1]
    if dense is not None:
        found["dense"] = rates[0]
    return found


def _too_large(models: Sequence[PreTrainedModel | DenseSource], device: torch.device) -> str | None:
    """Why the models are not measured: it would take long, or their packed copies do not fit beside them."""
    shells = [model.shell if isinstance(model, DenseSource) else model for model in models]
    parameters = [parameter for model in shells for parameter in model.parameters()]
    unloaded = any(isinstance(model, DenseSource) and not model.in_memory for model in models)
    if unloaded and sum(parameter.numel() for parameter in parameters) > CPU_PARAMETERS:
        # A run that holds a layer at a time must not need the host to hold both models for this figure.
        return "too large to be loaded for this; `slicegpt bench token` measures it"
    if device.type == "cpu" and sum(parameter.numel() for parameter in parameters) > CPU_PARAMETERS:
        return "too large for a few seconds on a CPU; `slicegpt bench token` measures it"
    # The weights where they run, and packed.
    if 2 * sum(parameter.nbytes for parameter in parameters) > free_memory(device):
        return f"the packed weights do not fit into the free memory ({device.type})"
    return None
