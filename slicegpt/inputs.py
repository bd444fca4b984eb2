"""What the calls of `slicegpt.api` are given: names, documents and models, checked and opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource, source_of
from slicegpt.hardware.devices import find_dtype
from slicegpt.hardware.offload import moved
from slicegpt.progress import Progress
from slicegpt.recipe import AUTO, Recipe


def read_recipe(recipe: str | os.PathLike | None) -> Recipe:
    """The recipe of a file or a sliced folder; None: the defaults."""
    return Recipe() if recipe is None else Recipe.read(recipe)


def checked_name(model: Any) -> str | os.PathLike:
    """`model`, which names one."""
    if not isinstance(model, str | os.PathLike):
        raise SliceGPTError(
            f"must be a name, a folder or a transformers model, got {type(model).__name__}", "model"
        )
    return model


def checked_documents(documents: Any, argument: str) -> list[str]:
    """Documents as a list of strings, at least one of them with text; an error names `argument`."""
    documents = list(documents) if isinstance(documents, Sequence) else [documents]
    wrong = next((each for each in documents if not isinstance(each, str)), None)
    if wrong is not None:
        raise SliceGPTError(
            f"must name a text or be a list of documents (str), got {type(wrong).__name__}", argument
        )
    if not any(document.strip() for document in documents):
        raise SliceGPTError("the documents hold no text", argument)
    return documents


@contextmanager
def opened_model(
    model: str | os.PathLike | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    progress: Progress,
) -> Iterator[tuple[DenseSource, str | None]]:
    """The dense model with its tokenizer, and its name; a loaded one is on the CPU and in eval mode until the end."""
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise SliceGPTError("is needed beside a loaded model, got None", "tokenizer")
        own = str(model.dtype).removeprefix("torch.")
        if recipe.dtype not in (AUTO, own):
            raise SliceGPTError(f"a loaded model keeps its own, {own}, got {recipe.dtype}", "dtype")
        training = model.training
        try:
            with moved(model.eval(), torch.device("cpu")):
                name = recipe.model or model.config.name_or_path or None
                yield source_of(model, tokenizer, name), name
        finally:
            model.train(training)
        return
    if model is None and recipe.model is None:
        raise SliceGPTError("a name, a folder or a transformers model is needed, got none", "model")
    name = os.fspath(checked_name(recipe.model if model is None else model))
    with progress.step(f"opening {name}"):
        # What cannot be sliced is refused by its config, before weights are downloaded or read.
        source = open_dense(name, find_dtype(recipe.dtype), sliceable=True)
    yield source if tokenizer is None else replace(source, tokenizer=tokenizer), name
