"""Token ids of a long text, as the published protocol has them: the joined text encoded once."""

from __future__ import annotations

import itertools
import re

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration.files import check_unicode
from slicegpt.errors import SliceGPTError
from slicegpt.families import FAMILIES

# A blank between two lower-case letters: the pre-tokenisers in use (GPT-2's and GPT-4's expressions,
# SentencePiece's meta symbol) all begin a new word there, so no token reaches across. A blank line between
# documents would not do: GPT-4's expression glues newlines to the full stop before them.
_WORD_BOUNDARY = re.compile(r"(?<=[a-z]) (?=[a-z])")


def encode_text(
    text: str, tokenizer: PreTrainedTokenizerBase, chunk: int = 1 << 18, context: int = 64
) -> torch.Tensor:
    """Encode `text` as a whole, special tokens (a BOS, where the tokenizer has one) added once.

    A fast tokenizer encodes one string on one core and a list of strings on all, so long text is cut between
    two words about every `chunk` characters. Every piece but the first starts `context` or more characters
    early; its surplus tokens must be the ones that the previous piece ends with. Where they are not, or where
    no place to cut is found, the text is encoded in one piece.

    Returns:
        int64 [T], the ids on the CPU.

    Raises:
        SliceGPTError: the text has half of a surrogate pair in it.
    """
    check_unicode(text, "the text")
    seams = _seams(text, chunk, context)
    stitched = _stitch(text, seams, tokenizer) if seams else None
    if stitched is None:
        ids = tokenizer(text, return_attention_mask=False, verbose=False).input_ids
    else:
        before, after = _special_tokens(tokenizer)
        ids = before + stitched + after
    return torch.tensor(ids, dtype=torch.int64)


def check_fits(model: PreTrainedModel, ids: torch.Tensor, length: int | None = None) -> None:
    """Refuse token ids that a model has no rows for, of tokens or of learned positions.

    Args:
        ids: int64 of any shape.
        length: tokens of the longest sequence; the last dimension of `ids` where not given.

    Raises:
        SliceGPTError: an id beyond the embedding table (the tokenizer has more tokens than the model), or a sequence
            beyond a table of learned positions.
    """
    check_rows(ids, model.get_input_embeddings().weight.shape[0])
    positions, length = learned_positions(model), ids.shape[-1] if length is None else length
    if positions is not None and length > positions:
        raise SliceGPTError(
            f"a sequence of {length} tokens is beyond the model's {positions} learned positions"
        )


def check_rows(ids: torch.Tensor, rows: int) -> None:
    """Refuse token ids that an embedding table of so many rows lacks; see `check_fits`."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= rows:
        raise SliceGPTError(
            f"the text has the token {largest}, and the model's embedding table {rows} rows: the tokenizer"
            " has more tokens than the model (resize the model's embeddings, or take the tokenizer that it came with)",
            "tokenizer",
        )


def learned_positions(model: PreTrainedModel) -> int | None:
    """Positions that a model has rows for; None where positions are not learned."""
    config = model.config
    family = FAMILIES.get(config.model_type)
    learned = getattr(config, "position_embedding", None) == "learned" if family is None else family.positions
    return config.max_position_embeddings if learned else None


def _seams(text: str, chunk: int, context: int) -> list[tuple[int, int]]:
    """Return pairs (start of the context, cut), both word boundaries, one pair per `chunk` characters."""
    seams = []
    for start in range(chunk, len(text), chunk):
        early = _WORD_BOUNDARY.search(text, start, start + chunk)
        cut = early and _WORD_BOUNDARY.search(text, early.start() + context, start + chunk)
        if cut:
            seams.append((early.start(), cut.start()))
    return seams


def _stitch(text: str, seams: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the ids of `text` without special tokens from pieces that overlap, None where they disagree."""

    def encode(pieces: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return tokenizer(pieces, **options).input_ids

    starts = [0] + [early for early, _ in seams]
    ends = [cut for _, cut in seams] + [len(text)]
    pieces = encode([text[start:end] for start, end in zip(starts, ends, strict=True)])
    contexts = encode([text[early:cut] for early, cut in seams])
    stitched = list(pieces[0])
    for (previous, piece), surplus in zip(itertools.pairwise(pieces), contexts, strict=True):
        # A context may begin unlike the running text (SentencePiece puts a blank before it); its end may not.
        tail = len(surplus) // 2
        if not tail or piece[: len(surplus)] != surplus or previous[-tail:] != surplus[-tail:]:
            return None
        stitched += piece[len(surplus) :]
    return stitched


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]
