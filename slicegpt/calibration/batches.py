"""Documents to token batches: the calibration samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from slicegpt.calibration.files import check_unicode
from slicegpt.calibration.tokens import encode_text
from slicegpt.errors import SliceGPTError


@dataclass(frozen=True)
class CalibrationBatch:
    """Some calibration samples, padded on the right to the longest of them.

    Attributes:
        input_ids: int64 [b, s].
        attention_mask: int64 [b, s], 1 for a token and 0 for padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.attention_mask.sum())


def sample_batches(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int = 128,
    seqlen: int = 2048,
    batch_size: int = 8,
    seed: int = 42,
    varied_seqlen: bool = False,
) -> list[CalibrationBatch]:
    """Draw calibration samples at random; the same seed draws the same samples, whatever the batch size.

    By default the documents are joined with blank lines, encoded, cut into windows of `seqlen` tokens, and
    `nsamples` different windows are drawn, in random order (a smaller `nsamples` draws the first of them).
    With `varied_seqlen` a sample is one document, truncated to `seqlen` tokens; samples are sorted by
    length, longest first, so that a batch holds little padding.

    Raises:
        SliceGPTError: an argument is out of range, or the text is too short.
    """
    check_positive(nsamples=nsamples, seqlen=seqlen, batch_size=batch_size)
    samples = draw_samples(documents, tokenizer, nsamples, seqlen, seed, varied_seqlen)
    return collate(samples, tokenizer, batch_size)


def draw_samples(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    varied_seqlen: bool,
    spare: int = 0,
) -> list[torch.Tensor]:
    """Draw calibration samples, int64 [s] each, as `sample_batches` does.

    Args:
        spare: windows to draw after them, as many of these as the text has (none of whole documents).
    """
    check_positive(nsamples=nsamples, seqlen=seqlen)
    generator = torch.Generator().manual_seed(seed)
    if varied_seqlen:
        return _draw_documents(documents, tokenizer, nsamples, seqlen, generator)
    return _draw_windows(documents, tokenizer, nsamples, seqlen, generator, spare)


def collate(
    samples: Sequence[torch.Tensor], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[CalibrationBatch]:
    """Put samples into batches of `batch_size`, in order."""
    check_positive(batch_size=batch_size)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return [_collate(samples[i : i + batch_size], padding) for i in range(0, len(samples), batch_size)]


def calibration_hash(batches: Sequence[CalibrationBatch]) -> str:
    """Return the sha256 of the samples in order: each one's length and ids, padding and batching left out."""
    digest = hashlib.sha256()
    for batch in batches:
        for ids, mask in zip(batch.input_ids.cpu(), batch.attention_mask.cpu(), strict=True):
            sample = ids[mask.bool()].numpy().astype("<i8")
            digest.update(len(sample).to_bytes(8, "little"))
            digest.update(sample.tobytes())
    return digest.hexdigest()


def check_positive(**values: int) -> None:
    """One clear error for the first of `values` that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise SliceGPTError(f"must be at least 1, got {value}", name)


def _draw_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    generator: torch.Generator,
    spare: int,
) -> list[torch.Tensor]:
    ids = encode_text("\n\n".join(documents), tokenizer)
    available = len(ids) // seqlen
    if available < nsamples:
        raise SliceGPTError(
            f"{nsamples} samples of {seqlen} tokens need {nsamples * seqlen:,} tokens;"
            f" the text has {len(ids):,}, enough for {available} (lower nsamples or seqlen or add text)",
            "nsamples",
        )
    windows = ids[: available * seqlen].view(available, seqlen)
    return list(windows[torch.randperm(available, generator=generator)[: nsamples + spare]])


def _draw_documents(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    order = [i for i in torch.randperm(len(documents), generator=generator).tolist() if documents[i].strip()]
    if len(order) < nsamples:
        raise SliceGPTError(
            f"varied lengths take one document per sample; {nsamples} samples were asked,"
            f" the text has {len(order)} documents that are not empty",
            "nsamples",
        )
    drawn = [documents[i] for i in order[:nsamples]]
    for document in drawn:
        check_unicode(document, "the text")
    encoded = tokenizer(drawn, truncation=True, max_length=seqlen, return_attention_mask=False).input_ids
    return sorted((torch.tensor(ids, dtype=torch.int64) for ids in encoded), key=len, reverse=True)


def _collate(samples: Sequence[torch.Tensor], padding: int) -> CalibrationBatch:
    input_ids = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(sample) for sample in samples])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return CalibrationBatch(input_ids, attention_mask)
