"""A dense model in a folder, and text in a file, as a user has them."""

from pathlib import Path

import torch
from support.tiny_models import tiny_model


def save_dense(path: Path, tokenizer, case: str = "llama", **changes) -> Path:
    """A tiny model with the tokenizer's vocabulary, in float32; `changes` are made to its config."""
    tiny_model(case, torch.float32, vocab_size=len(tokenizer), **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_text(path: Path, documents: list[str], characters: int = 20_000) -> Path:
    path.write_text("\n\n".join(documents)[:characters], encoding="utf-8")
    return path
