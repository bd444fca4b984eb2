"""Losses of the tokens of windows, for any causal language model of transformers, in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from slicegpt.errors import SliceGPTError
from slicegpt.modeling.wide_products import products_in_float32
from slicegpt.progress import Progress

# 2^24 logits are 128 MiB in float64, and enough rows for the head's matrix product to run at full speed.
LOGITS_AT_ONCE = 1 << 24


# Tokens of a batch that is chosen here. A CPU is busy with this many; a GPU takes what its memory holds.
_TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 16}

BatchSize = int | Literal["auto"]


def check_batch_size(batch_size: BatchSize) -> None:
    """One clear error for what is neither a whole number from 1 on nor "auto"."""
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if batch_size != "auto" and not (whole and batch_size >= 1):
        raise SliceGPTError(f"must be at least 1, or 'auto', got {batch_size!r}", "batch_size")


def window_losses(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: BatchSize = 1,
    progress: Progress | None = None,
    name: str = "perplexity",
    of: int | None = None,
) -> list[float]:
    """Sum over each of `windows` [n, s] of its tokens' negative log-likelihoods, the first token's left out, in nats.

    Args:
        batch_size: windows at a time; "auto": as many as keep the device busy, halved where its memory runs out.
        progress, name: where to report, and what.
        of: windows that several ranks evaluate together, these included; None: these are all. The progress is of all,
            as if the others were as far.

    Raises:
        SliceGPTError: a loss is not finite.
    """
    device = model.get_input_embeddings().weight.device
    report, losses = progress or Progress(quiet=True), []
    with torch.no_grad(), products_in_float32(device), _evaluating(model):
        losses_of = _loss_function(model, windows[:1, :16].to(device))
        everywhere = len(windows) if of is None else of
        with report.stage(name, everywhere, "windows", everywhere * windows.shape[1]) as advance:
            size = first_size(windows, device) if batch_size == "auto" else batch_size
            while len(losses) < len(windows):
                batch = windows[len(losses) : len(losses) + size]
                try:
                    losses += losses_of(batch.to(device)).sum(dim=1).tolist()
                except torch.OutOfMemoryError:
                    if batch_size != "auto" or size == 1:
                        raise
                    size //= 2
                    continue
                advance(len(losses) * everywhere // len(windows) - advance.done)
                check_finite_losses(losses)
    return losses


def check_finite_losses(losses: Sequence[float]) -> None:
    """One clear error for the first window whose loss is NaN or infinite."""
    bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise SliceGPTError(f"the loss of window {bad} is {losses[bad]}", "model")


def first_size(windows: torch.Tensor, device: torch.device) -> int:
    """The windows [n, s] of a batch that "auto" begins with: a power of two, at most n."""
    tokens = _TOKENS_AT_ONCE["cuda" if device.type == "cuda" else "cpu"]
    fitting = max(1, min(tokens // windows.shape[1], len(windows)))
    return 1 << (fitting.bit_length() - 1)


def _loss_function(model: PreTrainedModel, probe: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from ids [b, s] to the float64 losses [b, s - 1] of the tokens after the first.

    A vocabulary of 50k and a batch of 8 windows make 3 GB of float32 logits, so the head is applied to some
    tokens at a time. A few architectures do more than apply it (soft-capped or scaled logits); the probe
    [1, n] finds out.
    """
    head, trunk = model.get_output_embeddings(), model.base_model

    def hidden_states(ids: torch.Tensor) -> torch.Tensor:
        return trunk(input_ids=ids, use_cache=False).last_hidden_state

    def from_logits(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        size = max(1, LOGITS_AT_ONCE // logits.shape[1])
        pieces = zip(logits.split(size), ids[:, 1:].flatten().split(size), strict=True)
        return torch.cat([token_losses(part, labels) for part, labels in pieces]).view(len(ids), -1)

    def from_hidden_states(ids: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states(ids)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        pieces = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([token_losses(head(states), labels) for states, labels in pieces]).view(len(ids), -1)

    if head is None or trunk is model:
        return from_logits
    plain = torch.equal(head(hidden_states(probe)), model(input_ids=probe, use_cache=False).logits)
    return from_hidden_states if plain else from_logits


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return float64 [n] from logits [n, V].

    A float32 softmax over 49k classes is biased: it shifts the mean loss of SmolLM2-135M by 3e-6, relative.
    """
    return functional.cross_entropy(logits.double(), targets.to(logits.device), reduction="none")


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
