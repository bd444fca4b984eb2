"""Perplexity by the protocol of the published results (SparseGPT, SliceGPT section 4)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration.tokens import check_fits, encode_text
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource
from slicegpt.hardware.layerwise import losses_of
from slicegpt.hardware.ranks import Ranks
from slicegpt.modeling.losses import BatchSize, check_batch_size
from slicegpt.progress import Progress


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nll).
        tokens: tokens predicted, `windows * (seqlen - 1)`.
        nll: mean negative log-likelihood of a token, in nats.
        windows: windows evaluated.
        seconds: wall time of the forward passes, without loading and tokenising.
    """

    perplexity: float
    tokens: int
    nll: float
    windows: int
    seconds: float


def perplexity(
    model: PreTrainedModel | DenseSource,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    seqlen: int = 2048,
    batch_size: BatchSize = 1,
    max_windows: int | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> PerplexityResult:
    """Measure the perplexity of any causal language model on a text.

    The documents are joined with blank lines, encoded once, and cut into windows of `seqlen` tokens that do
    not overlap; the last, shorter one is dropped. Each window predicts its tokens but the first. The losses
    are computed from the model's logits, and summed, in float64.

    Args:
        model: a loaded one, or the source of one that is run layer by layer.
        batch_size: windows at a time, or "auto", see `window_losses`.
        max_windows: evaluate only the first so many windows.
        progress: where to report; None is silent.
        device: where a source's layers run; a loaded model stays where it is.
        ranks: the windows are dealt out among them, in the batches of one rank; the text is that of the first, and all
            of them return its figures.

    Raises:
        SliceGPTError: an argument is out of range, the text is shorter than a window, or a loss is not
            finite.
    """
    check_batch_size(batch_size)
    for name, (value, least) in {"seqlen": (seqlen, 2), "max_windows": (max_windows, 1)}.items():
        if value is not None and value < least:
            raise SliceGPTError(f"must be at least {least}, got {value}", name)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise SliceGPTError(f"{seqlen} is beyond the model's {positions} positions", "seqlen")
    ranks = ranks or Ranks()
    windows = ranks.decide(lambda: text_windows(documents, tokenizer, seqlen)[:max_windows])
    check_fits(model.shell if isinstance(model, DenseSource) else model, windows)
    start = time.perf_counter()
    total = sum(shared_losses(model, windows, batch_size, progress, device, ranks))
    tokens = len(windows) * (seqlen - 1)
    nll = total / tokens
    if nll > 700:  # exp() overflows; a model that guesses evenly among a million tokens has 14
        raise SliceGPTError(f"the mean loss of a token is {nll:.4g} nats: the model is broken", "model")
    return PerplexityResult(math.exp(nll), tokens, nll, len(windows), time.perf_counter() - start)


def text_windows(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seqlen: int) -> torch.Tensor:
    """The windows [n, seqlen] of a text: see `perplexity`."""
    ids = encode_text("\n\n".join(documents), tokenizer)
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    if not len(windows):
        raise SliceGPTError(
            f"the text has {len(ids):,} tokens, less than one window of seqlen={seqlen}", "documents"
        )
    return windows


def shared_losses(
    model: PreTrainedModel | DenseSource,
    windows: torch.Tensor,
    batch_size: BatchSize,
    progress: Progress | None,
    device: torch.device | str,
    ranks: Ranks,
) -> list[float]:
    """`losses_of` all windows [n, s], of which every rank evaluates its share, in the batches of one rank."""
    if ranks.size == 1:
        return losses_of(model, windows, batch_size, progress, device)
    size = 1 if batch_size == "auto" else batch_size
    dealt = ranks.deal(torch.arange(len(windows)).split(size))
    losses = torch.zeros(len(windows), dtype=torch.float64)
    if dealt:
        mine = torch.cat(dealt)
        own = losses_of(model, windows[mine], batch_size, progress, device, of=len(windows))
        losses[mine] = torch.tensor(own, dtype=torch.float64)
    ranks.sum_(losses)  # of one number and zeros: exact
    return losses.tolist()
