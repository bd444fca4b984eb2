"""Calibration samples from several sources: `a.txt:2,b.jsonl:1`, with text that the model writes among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slicegpt.calibration.documents import check_documents, load_documents
from slicegpt.calibration.files import COLUMN_FILES, has_columns
from slicegpt.errors import SliceGPTError, renamed

if TYPE_CHECKING:  # sources are named, and their files read, before torch is imported
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slicegpt.calibration.batches import CalibrationBatch
    from slicegpt.families import DenseSource
    from slicegpt.progress import Progress

SELF = "self"  # text sampled from the dense model
RANDOM_TOKENS = "random-tokens"  # tokens drawn uniformly from the vocabulary
GENERATED = (SELF, RANDOM_TOKENS)

# Windows drawn after the samples: the refit's λ is chosen by so many.
HELD_OUT = 4
# And so many others, where the text has them, tell whether the samples were enough; fewer than two tell nothing.
UNSEEN = 4
FEWEST_UNSEEN = 2


@dataclass(frozen=True)
class Source:
    """One source of calibration text.

    Attributes:
        name: as `load_documents` takes it, or one of `GENERATED`.
        weight: its share of the samples, relative to the other sources' weights.
        documents: its text; None where samples are generated.
    """

    name: str
    weight: float = 1.0
    documents: Sequence[str] | None = None


@dataclass(frozen=True)
class Calibration:
    """The calibration samples, and which source gave how many of them.

    Attributes:
        batches: all samples.
        sources: `[{name, weight, nsamples, tokens}]`.
        held_out: a few windows [n, seqlen] of the same sources that are not among the samples; maybe none. The refit's
            λ is chosen by them.
        unseen: windows [m, seqlen] that are neither samples nor among `held_out`, to judge the sliced model by. Only of
            sources that are texts: the model would have to write a second time, which takes as long as the first.
            Where the texts have too few, windows of `held_out` (`unseen_are_held_out`); maybe none.
        seen: as many windows [m, seqlen] of the same sources that are samples.
    """

    batches: list[CalibrationBatch]
    sources: list[dict]
    held_out: torch.Tensor
    unseen: torch.Tensor
    seen: torch.Tensor

    @property
    def unseen_are_held_out(self) -> bool:
        """Whether a window of `unseen` is one of `held_out`, for want of others."""
        return bool((self.unseen[:, None] == self.held_out[None]).all(dim=-1).any())


def parse_sources(spec: str) -> list[tuple[str, float]]:
    r"""Return names and weights of `NAME[:WEIGHT][,NAME[:WEIGHT]]...`.

    A spec that names an existing file or folder is that one, whatever is in its name; so is a part of it. In
    other cases `\,` and `\:` stand for a comma and a colon of the name itself.

    Raises:
        SliceGPTError: a name is empty or given twice, or a weight is not above 0.
    """
    sources = []
    for part in _split(spec):
        name, weight = part, 1.0
        match = (
            None
            if Path(_unescape(part)).exists()
            else re.fullmatch(r"(.*)(?<!\\):([^:/\\]*)", part, re.DOTALL)
        )
        if match:
            name = match[1]
            try:
                weight = float(match[2])
            except ValueError:
                raise SliceGPTError(
                    f"the weight of {name} must be a number, got {match[2]!r} "
                    r"(write \: for a colon in a name)",
                    "calibration",
                ) from None
            if not 0 < weight < float("inf"):
                raise SliceGPTError(f"the weight of {name} must be above 0, got {match[2]}", "calibration")
        name = _unescape(name)
        if not name:
            raise SliceGPTError(f"a source without a name in {spec!r}", "calibration")
        sources.append((name, weight))
    names = [name for name, _ in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SliceGPTError(f"{twice} is named twice; give it one weight", "calibration")
    return sources


def split_names(spec: str, argument: str) -> list[str]:
    r"""Return the names of `NAME[,NAME]...`, which have no weights; `\,` stands for a comma of a name.

    Raises:
        SliceGPTError: a name is empty or given twice; the message names `argument`.
    """
    names = [part if Path(part).exists() else _unescape(part) for part in _split(spec)]
    for name in names:
        if not name or names.count(name) > 1:
            raise SliceGPTError(f"every name must be given once, got {spec!r}", argument)
    return names


def _split(spec: str) -> list[str]:
    return [spec] if Path(spec).exists() else re.split(r"(?<!\\),", spec)


def _unescape(name: str) -> str:
    return name.replace(r"\,", ",").replace(r"\:", ":")


def load_sources(spec: str, text_column: str | None = None) -> list[Source]:
    """Read the documents that a `calibration` choice names; what the model will write comes later.

    Args:
        text_column: of the files with columns among the sources.
    """
    with renamed(spec="calibration"):
        return [
            Source(name, weight, None if name in GENERATED else load_documents(name, "train", column))
            for name, weight, column in _checked_sources(spec, text_column)
        ]


def check_sources(spec: str, text_column: str | None = None) -> None:
    """Refuse a `calibration` choice whose files are not there; nothing is read.

    Raises:
        SliceGPTError: a name, weight or column that cannot be, or a text that is not there.
    """
    _checked_sources(spec, text_column)


def _checked_sources(spec: str, text_column: str | None) -> list[tuple[str, float, str | None]]:
    """Name, weight and column of every source."""
    sources = parse_sources(spec)
    columns = [name for name, _ in sources if has_columns(name)]
    if text_column is not None and not columns:
        raise SliceGPTError(f"{spec} has no {COLUMN_FILES}, got {text_column!r}", "text_column")
    checked = [(name, weight, text_column if name in columns else None) for name, weight in sources]
    for name, _, column in checked:
        if name not in GENERATED:
            check_documents(name, column, "calibration")
    return checked


def share_out(nsamples: int, weights: Sequence[float]) -> list[int]:
    """Share `nsamples` out in proportion to `weights`: rounded down, the rest to the largest remainders."""
    quotas = [nsamples * weight / sum(weights) for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda index: (shares[index] - quotas[index], index))
    for index in by_remainder[: nsamples - sum(shares)]:
        shares[index] += 1
    return shares


def sample_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int = 128,
    seqlen: int = 2048,
    batch_size: int = 8,
    seed: int = 42,
    varied_seqlen: bool = False,
    model: PreTrainedModel | DenseSource | None = None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Calibration:
    """Draw calibration samples from several sources; the same seed draws the same samples.

    Every source's samples are drawn as `sample_batches` draws them, so that no two of them overlap; the samples
    of all sources are then spread evenly among each other. One source of text alone gives what `sample_batches`
    gives.

    Args:
        varied_seqlen: a document a sample, where a source has documents.
        model: the dense model, needed by the source "self"; what does not fit into it is refused. One that is not
            loaded is so for as long as it writes, where there is memory for all of it.
        device: where the model writes; it is brought there and back. None: where it is.

    Raises:
        SliceGPTError: a weight is too small for a single sample, a text is too short, the model is missing.
    """
    import torch

    from slicegpt.calibration.batches import check_positive, collate, draw_samples
    from slicegpt.calibration.self_sampling import generate_samples, whole_model
    from slicegpt.calibration.tokens import check_fits
    from slicegpt.families import DenseSource
    from slicegpt.hardware.offload import moved

    check_positive(nsamples=nsamples, seqlen=seqlen, batch_size=batch_size)
    weights = [source.weight for source in sources]
    shares, spares = share_out(nsamples, weights), share_out(HELD_OUT, weights)
    texts = [source.weight * (source.documents is not None) for source in sources]
    others = share_out(UNSEEN, texts) if any(texts) else [0] * len(sources)
    shell = model.shell if isinstance(model, DenseSource) else model
    drawn: list[list[torch.Tensor]] = []
    held_out, judges, substitutes = [], [], []
    for source, share, spare, other in zip(sources, shares, spares, others, strict=True):
        if not share:
            raise SliceGPTError(
                f"{source.name}'s weight leaves it none of {nsamples} samples; raise it, or nsamples",
                "calibration",
            )
        if source.name == SELF:
            if model is None:
                raise SliceGPTError("the source 'self' needs the dense model, got None", "model")
            with whole_model(model, share + spare, seqlen) as writer, moved(writer, device):
                samples = list(
                    generate_samples(writer, tokenizer, share + spare, seqlen, seed, progress=progress)
                )
            del writer  # one that was loaded for this is freed
        elif source.name == RANDOM_TOKENS:
            rows = None if shell is None else shell.get_input_embeddings().weight.shape[0]
            samples = _random_tokens(tokenizer, share, seqlen, seed, rows)
        else:
            try:
                samples = draw_samples(
                    source.documents, tokenizer, share, seqlen, seed, varied_seqlen, spare + other
                )
            except SliceGPTError as error:
                if len(sources) == 1:
                    raise
                raise SliceGPTError(f"{source.name}: {error.reason}", error.argument) from error
        seen, spared = samples[:share], samples[share : share + spare]
        drawn.append(seen)
        held_out += spared
        # Pairs of one source, seen and unseen: what makes one source harder than another is in both.
        judges += zip(seen, samples[share + spare :], strict=False)
        substitutes += zip(seen, spared, strict=False)
    if len(judges) < min(FEWEST_UNSEEN, len(substitutes)):
        judges = substitutes
    # Interleaved: any stretch of the samples holds every source in its proportion.
    places = [((j + 0.5) / share, i, j) for i, share in enumerate(shares) for j in range(share)]
    samples = [drawn[i][j] for _, i, j in sorted(places)]
    if varied_seqlen:
        samples.sort(key=len, reverse=True)
    if shell is not None:
        check_fits(shell, torch.cat(samples), max(map(len, samples)))
    record = [
        {
            "name": source.name,
            "weight": source.weight,
            "nsamples": len(part),
            "tokens": sum(map(len, part)),
        }
        for source, part in zip(sources, drawn, strict=True)
    ]
    none = torch.empty(0, seqlen, dtype=torch.int64)
    seen, unseen = zip(*judges, strict=True) if judges else ((), ())
    windows = [torch.stack(parts) if parts else none for parts in map(list, (held_out, unseen, seen))]
    return Calibration(collate(samples, tokenizer, batch_size), record, *windows)


def _random_tokens(
    tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int, rows: int | None
) -> list[torch.Tensor]:
    import torch

    from slicegpt.calibration.self_sampling import ordinary_tokens

    ids = ordinary_tokens(tokenizer, rows)
    generator = torch.Generator().manual_seed(seed)
    return list(ids[torch.randint(len(ids), (nsamples, seqlen), generator=generator)])
