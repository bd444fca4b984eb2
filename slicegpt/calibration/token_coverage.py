"""Is the calibration text enough? What its tokens alone tell, before anything is sliced.

Three figures, each with a threshold that follows from what it estimates:

- **Tokens per column of the stream.** The covariance of `N` tokens scatters around the true one: the eigenvalues of
  white noise in `D` columns spread over `(1 ± sqrt(D / N))²` (Marchenko and Pastur, 1967), a factor of 2.8 at 16
  tokens a column. Below that, axes whose energies differ by less are told apart by chance. (The published protocol
  has 64 to 128.)
- **Unseen mass.** The share of tokens that occur once estimates the probability that the next token of such text is
  one the samples never showed (Good, 1953). Above a tenth, more of the same text would change the result.
- **Growth.** Open text goes on bringing new tokens: twice the text shows `2^β` times as many different ones, `β` of
  0.5 to 0.6 (Heaps' law). Where `β` falls below 0.4 though most of the vocabulary never occurred, the text has a
  closed vocabulary: it is narrow, and what is cut away is what other text needs. Measured with SmolLM2-135M's
  tokenizer on 65,536 tokens: presidents' addresses 0.53, Shakespeare 0.51, Python's language reference 0.33.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from slicegpt.calibration.batches import CalibrationBatch

TOKENS_PER_COLUMN = 16
UNSEEN_MASS = 0.1
GROWTH = 0.4
VOCABULARY_SHOWN = 0.25  # above this the vocabulary itself runs out, and growth says nothing about the text


def coverage(batches: Sequence[CalibrationBatch], vocab_size: int, dense_width: int) -> dict:
    """Figures of the calibration samples; `calibration_warnings` judges them.

    Returns:
        `tokens`, `tokens_per_column` (of D), `distinct_tokens`, `vocabulary` (the share of it that occurs),
        `unseen_mass` (probability of an unseen token, Good-Turing) and `growth` (exponent of the number of distinct
        tokens from the first half of the samples to all of them).
    """
    counts = torch.zeros(2, vocab_size, dtype=torch.int64)
    samples = [
        ids[mask.bool()].cpu()
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    for index, ids in enumerate(samples):
        # Halves by turns, so that both hold every source, and long samples as well as short ones.
        counts[index % 2] += torch.bincount(ids, minlength=vocab_size)
    total = counts.sum(dim=0)
    tokens, distinct = int(total.sum()), int((total > 0).sum())
    halves = [int((half > 0).sum()) for half in counts if half.any()]
    growth = math.log2(distinct * len(halves) / sum(halves)) if len(halves) == 2 else None
    return {
        "tokens": tokens,
        "tokens_per_column": round(tokens / dense_width, 2),
        "distinct_tokens": distinct,
        "vocabulary": round(distinct / vocab_size, 4),
        "unseen_mass": round(int((total == 1).sum()) / max(tokens, 1), 4),
        "growth": None if growth is None else round(growth, 3),
    }


def calibration_warnings(figures: dict) -> list[str]:
    """One sentence for each way in which the samples are too few or too much alike; none where they will do."""
    warnings = []
    if figures["tokens_per_column"] < TOKENS_PER_COLUMN:
        warnings.append(
            f"the calibration text is small: {figures['tokens']:,} tokens are {figures['tokens_per_column']:.1f} for "
            f"each column of the model, at least {TOKENS_PER_COLUMN} are needed to tell principal axes from chance; "
            "raise nsamples or seqlen"
        )
    elif figures["unseen_mass"] > UNSEEN_MASS:
        warnings.append(
            f"the calibration text is small: {figures['unseen_mass']:.0%} of the tokens in more text of this kind "
            f"would be ones that it does not show (at most {UNSEEN_MASS:.0%} is sound); raise nsamples or seqlen"
        )
    growth = figures["growth"]
    if growth is not None and growth < GROWTH and figures["vocabulary"] < VOCABULARY_SHOWN:
        warnings.append(
            f"the calibration text is narrow: it shows {figures['vocabulary']:.1%} of the vocabulary and hardly "
            f"brings new tokens any more (growth {growth:.2f}, open text has 0.5); the model will be worse on other "
            "text: mix in another source, such as TEXT:3,self:1"
        )
    return warnings
