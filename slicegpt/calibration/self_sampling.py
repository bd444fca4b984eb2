"""Calibration text that the dense model writes itself, for where no text is at hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from slicegpt.calibration.tokens import check_fits
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource, facts_of
from slicegpt.hardware.devices import kernels_for_new_shapes
from slicegpt.hardware.memory import free_memory, has_room
from slicegpt.modeling import CACHE
from slicegpt.progress import Progress

# A model's weights and what it computes with, in units of the weights.
_MARGIN = 1.1


@dataclass(frozen=True)
class SamplingSettings:
    """How the model is sampled.

    Attributes:
        temperature: the logits are divided by it.
        min_p: tokens less probable than this fraction of the most probable one are never drawn.
        batch_size: sequences written at a time. The weights are read once a token of all of them.
    """

    temperature: float = 1.0
    min_p: float = 0.0
    batch_size: int = 128

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise SliceGPTError(f"must be above 0, got {self.temperature}", "temperature")
        if not 0 <= self.min_p < 1:
            raise SliceGPTError(f"must lie in [0, 1), got {self.min_p}", "min_p")
        if self.batch_size < 1:
            raise SliceGPTError(f"must be at least 1, got {self.batch_size}", "batch_size")


class _PreallocatedLayer(DynamicLayer):
    """Keys and values in buffers of their final length: transformers' own layer copies all of them every token."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [
            states.new_empty(*states.shape[:-2], self.length, states.shape[-1])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values


def _cache(model: PreTrainedModel, length: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    # Sliding layers keep their own, which drops what has left the window.
    cache.layers = [
        _PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@torch.no_grad()
def continue_tokens(
    model: PreTrainedModel,
    starts: torch.Tensor,
    length: int,
    generator: torch.Generator,
    settings: SamplingSettings | None = None,
    banned: torch.Tensor | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Continue `starts` [n, s] to [n, length] by sampling token after token, all sequences at once.

    Args:
        starts: ids; -1 stands for tokens that a shorter start leaves to be drawn (the first column has none).
        banned: bool [n, V] or [V], tokens that are never drawn (special tokens, which would end the text).
        advance: called with 1 after every token.
    """
    settings = settings or SamplingSettings()
    ids = torch.full((len(starts), length), -1, dtype=torch.int64, device=starts.device)
    known = min(starts.shape[1], length)
    ids[:, :known] = starts[:, :known]
    cache, fed = _cache(model, length), 0
    # What all starts have is read at once; from there on every sequence takes a token a step, given or drawn.
    for position in range(int((ids >= 0).all(dim=0).int().cumprod(dim=0).sum()), length):
        with kernels_for_new_shapes(starts.device):
            output = model(ids[:, fed:position], use_cache=True, logits_to_keep=1, **{CACHE: cache})
        fed = position
        drawn = _draw(output.logits[:, -1], generator, settings, banned)
        ids[:, position] = torch.where(ids[:, position] < 0, drawn, ids[:, position])
        advance(1)
    return ids


def _draw(
    logits: torch.Tensor, generator: torch.Generator, settings: SamplingSettings, banned: torch.Tensor | None
) -> torch.Tensor:
    """One id a row of `logits` [n, V], by inversion: a uniform number against the summed probabilities."""
    logits = logits.float() / settings.temperature
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if settings.min_p:
        floor = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    # Float64: float32 sums over 10^5 tokens would lose the rare ones, which are what sampling is for.
    sums = probabilities.double().cumsum(dim=-1)
    uniform = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator).to(sums.device)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
    return drawn.squeeze(-1).clamp(max=sums.shape[-1] - 1)


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> torch.Tensor:
    """Ids [n] of the tokens that stand for text: all but the special ones.

    Args:
        rows: of the model's embedding table, where a tokenizer may have more tokens than it.
    """
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    tokens = len(tokenizer) if rows is None else min(len(tokenizer), rows)
    return torch.tensor([index for index in range(tokens) if index not in special])


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int = 42,
    settings: SamplingSettings | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Let the model write calibration text: int64 [nsamples, seqlen], on the CPU; the same seed, the same text.

    A third of the samples each, in turn:

    - documents, as the model begins them; what stands before them, such as BOS, is cut off: a sample's first token is
      the attention sink of all others, and a model that is sliced on one sink token fails on text that begins with any
      other (docs/quality.md);
    - conversations, from inside the chat template where the user's turn begins, so that the model writes both sides
      (Xu et al., Magpie, arXiv 2406.08464); none where the model has no template;
    - what the model makes of a first token drawn uniformly from the vocabulary (Liu et al., LLM-QAT, arXiv
      2305.17888).

    Documents and what follows a random token hold no special tokens, so that they are full of text. At temperature 1
    the text is as varied as the model takes text to be. How each kind fares is measured in docs/quality.md.
    """
    settings = settings or SamplingSettings()
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    rows = model.get_output_embeddings().weight.shape[0]
    ordinary = ordinary_tokens(tokenizer, rows)
    special = torch.ones(rows, dtype=torch.bool)
    special[ordinary] = False
    document, chat = document_start(tokenizer), chat_start(tokenizer)
    kinds = ["document", "random"] if chat is None else ["document", "conversation", "random"]
    kinds = [kinds[i % len(kinds)] for i in range(nsamples)]
    drawn = ordinary[torch.randint(len(ordinary), (nsamples,), generator=generator)].tolist()
    openings = {"document": document, "conversation": chat}
    known = [openings.get(kind, [token]) for kind, token in zip(kinds, drawn, strict=True)]
    width = max(map(len, known))
    check_fits(model, torch.tensor([index for start in known for index in start]), seqlen)
    starts = torch.tensor([start + [-1] * (width - len(start)) for start in known])
    # Where the model has no position for it, a document keeps its start.
    cut = len(document) if seqlen + len(document) <= model.config.max_position_embeddings else 0
    banned = special * torch.tensor([kind != "conversation" for kind in kinds])[:, None]
    report = progress or Progress(quiet=True)
    batch = min(settings.batch_size, _sequences_that_fit(model, seqlen + cut))
    pieces = list(zip(starts.split(batch), banned.split(batch), strict=True))
    shortest = [int((piece >= 0).sum(dim=1).min()) for piece, _ in pieces]
    tokens = sum(max(0, seqlen + cut - length) for length in shortest)
    with report.stage("sampling the model", tokens, "steps", nsamples * seqlen) as advance:
        written = [
            continue_tokens(
                model, piece.to(device), seqlen + cut, generator, settings, never.to(device), advance
            ).cpu()
            for piece, never in pieces
        ]
    ids = torch.cat(written)
    is_document = torch.tensor([kind == "document" for kind in kinds])
    return torch.where(is_document[:, None], ids[:, cut:], ids[:, :seqlen])


@contextmanager
def whole_model(
    model: PreTrainedModel | DenseSource, sequences: int, length: int
) -> Iterator[PreTrainedModel]:
    """The model that writes: one that is not loaded is so within it, for it reads every weight once a token.

    Args:
        sequences, length: what it will write.

    Raises:
        SliceGPTError: the model and the keys and values of the sequences do not fit into the host's free memory.
    """
    if not isinstance(model, DenseSource):
        yield model
        return
    batch = min(sequences, SamplingSettings().batch_size)
    needed = int(_MARGIN * model.total_bytes) + batch * _sequence_bytes(model.shell, length)
    host = torch.device("cpu")
    if not model.in_memory and not has_room(needed, host):
        raise SliceGPTError(
            f"'self' is text that the dense model writes, which needs all of it in memory: {needed / 1e9:.1f} GB, and"
            f" {free_memory(host) / 1e9:.1f} GB are free; name a text instead",
            "calibration",
        )
    yield model.load()


def _sequences_that_fit(model: PreTrainedModel, length: int) -> int:
    """Sequences whose keys and values take at most half of what is free on a GPU. A CPU is not asked: there the text
    must not depend on what else runs."""
    if model.device.type != "cuda":
        return sys.maxsize
    return max(1, free_memory(model.device) // 2 // _sequence_bytes(model, length))


def _sequence_bytes(model: PreTrainedModel, length: int) -> int:
    """What the keys and values of one sequence take."""
    facts = facts_of(model.config)
    if (latent := facts.get("kv_lora_rank")) is not None:
        numbers = facts["num_hidden_layers"] * (latent + facts["head_dim"])
        return numbers * length * model.dtype.itemsize
    heads = facts.get("num_key_value_heads") or facts["num_attention_heads"]
    head_dim = facts.get("head_dim") or facts["dense_hidden_size"] // facts["num_attention_heads"]
    return 2 * facts["num_hidden_layers"] * heads * head_dim * length * model.dtype.itemsize


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a document: `<|endoftext|>` where the tokenizer has it, else BOS, EOS, or a line break.

    A chat model's BOS may open a turn, so the token that separated documents in pre-training comes first.
    """
    names = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    candidates = (names.get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((index for index in candidates if index is not None), None)
    return tokenizer("\n", add_special_tokens=False).input_ids[:1] if start is None else [start]


def chat_start(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The chat template up to where the user's words begin; None without a template."""
    if not tokenizer.chat_template:
        return None
    words = "\u2603 words of the user"  # nothing that a template contains
    conversation = [{"role": "user", "content": words}]
    before, found, _ = tokenizer.apply_chat_template(conversation, tokenize=False).partition(words)
    if not found or not before:
        return None
    return tokenizer(before, add_special_tokens=False).input_ids
