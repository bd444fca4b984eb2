"""Losses of the tokens of windows, for any causal language model of transformers, in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress

# 2^24 logits are 128 MiB in float64, and enough rows for the head's matrix product to run at full speed.
_LOGITS_AT_ONCE = 1 << 24


def window_losses(
    model: PreTrainedModel, windows: torch.Tensor, batch_size: int = 1, progress: Progress | None = None
) -> list[float]:
    """Sum over each of `windows` [n, s] of its tokens' negative log-likelihoods, the first token's left out, in nats.

    Raises:
        SliceGPTError: a loss is not finite.
    """
    device = model.get_input_embeddings().weight.device
    report, losses = progress or Progress(quiet=True), []
    with torch.no_grad(), _evaluating(model):
        token_losses = _loss_function(model, windows[:1, :16].to(device))
        with report.stage("perplexity", len(windows), "windows") as advance:
            for batch in windows.split(batch_size):
                losses += token_losses(batch.to(device)).sum(dim=1).tolist()
                advance(len(batch))
                bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
                if bad is not None:
                    raise SliceGPTError(f"the loss of window {bad} is {losses[bad]}", "model")
    return losses


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
        size = max(1, _LOGITS_AT_ONCE // logits.shape[1])
        pieces = zip(logits.split(size), ids[:, 1:].flatten().split(size), strict=True)
        return torch.cat([_losses(part, labels) for part, labels in pieces]).view(len(ids), -1)

    def from_hidden_states(ids: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states(ids)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        size = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
        pieces = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([_losses(head(states), labels) for states, labels in pieces]).view(len(ids), -1)

    if head is None or trunk is model:
        return from_logits
    plain = torch.equal(head(hidden_states(probe)), model(input_ids=probe, use_cache=False).logits)
    return from_hidden_states if plain else from_logits


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
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
