"""Token windows to train on, and others, held out, to evaluate on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from slicegpt.calibration import Source, encode_text
from slicegpt.calibration.mixture import share_out
from slicegpt.errors import SliceGPTError


class Windows(Dataset):
    """Rows of an int64 tensor [n, seqlen] as causal language modelling takes them: the labels are the inputs."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@dataclass(frozen=True)
class TrainingText:
    """Windows of equal length: `train` in random order, `held_out` never trained on."""

    train: Windows
    held_out: Windows

    def sha256(self) -> str:
        """A hash of all ids, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def training_text(
    documents: Sequence[str] | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int = 1024,
    nsamples: int | None = None,
    eval_samples: int = 32,
    eval_documents: Sequence[str] | None = None,
    seed: int = 42,
) -> TrainingText:
    """Cut the joined documents into windows of `seqlen` tokens that do not overlap, and deal them out at random.

    Args:
        documents: texts, or sources of text: as many windows as their weights allow are taken of each.
        nsamples: windows to train on (the paper takes 1,000 to 5,000); None takes all.
        eval_samples: windows to hold out; at most a tenth of the text where that is all there is to choose from.
        eval_documents: a text of its own to evaluate on; none of `documents` is held out then.
        seed: the same seed deals the same windows.

    Raises:
        SliceGPTError: an argument is out of range, or a text is too short.
    """
    for name, value, least in (
        ("seqlen", seqlen, 2),
        ("nsamples", nsamples, 1),
        ("eval_samples", eval_samples, 1),
    ):
        if value is not None and value < least:
            raise SliceGPTError(f"must be at least {least}, got {value}", name)
    if documents and isinstance(documents[0], Source):
        windows = _mixed(documents, tokenizer, seqlen, seed)
    else:
        windows = _windows(documents, tokenizer, seqlen, seed, "data")
    if eval_documents is not None:
        held_out = _windows(eval_documents, tokenizer, seqlen, seed, "eval_data")[:eval_samples]
    else:
        if len(windows) < 2:
            raise SliceGPTError(
                f"one window of {seqlen} tokens cannot be split into text to train on and text"
                " to evaluate on; add text, lower seqlen, or give eval_data",
                "data",
            )
        count = min(eval_samples, max(1, len(windows) // 10))
        held_out, windows = windows[:count], windows[count:]
    if nsamples is not None and nsamples > len(windows):
        raise SliceGPTError(
            f"{nsamples} windows of {seqlen} tokens were asked for; the text has {len(windows)} to train on",
            "nsamples",
        )
    return TrainingText(Windows(windows[:nsamples]), Windows(held_out))


def _mixed(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, seqlen: int, seed: int
) -> torch.Tensor:
    """Windows of several sources in the proportion of their weights, in random order.

    As many as there are: the source that has the fewest for its weight decides.
    """
    generated = [source.name for source in sources if source.documents is None]
    if generated:
        raise SliceGPTError(f"{generated[0]} is not text to train on; name files or built-in texts", "data")
    parts = [_windows(source.documents, tokenizer, seqlen, seed, "data") for source in sources]
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in sources]
    whole = min(len(part) * sum(weights) / weight for part, weight in zip(parts, weights, strict=True))
    shares = share_out(int(whole), weights)
    windows = torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seqlen: int, seed: int, name: str
) -> torch.Tensor:
    ids = encode_text("\n\n".join(documents), tokenizer)
    count = len(ids) // seqlen
    if not count:
        raise SliceGPTError(
            f"the text has {len(ids):,} tokens, less than one window of seqlen={seqlen}", name
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return ids[: count * seqlen].view(count, seqlen)[order]
