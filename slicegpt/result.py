"""What `slicegpt.slice` returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.report import SliceReport
from slicegpt.modeling import SlicedForCausalLM


class SliceResult:
    """What `slice` returns: `model, tokenizer, report = slicegpt.slice(...)`.

    Attributes:
        tokenizer: the dense model's.
        report: what was done; it prints as a table, and `report.record` holds the figures.
    """

    def __init__(
        self, model: SlicedForCausalLM | Path, tokenizer: PreTrainedTokenizerBase, report: SliceReport
    ):
        self._model, self.tokenizer, self.report = model, tokenizer, report

    @property
    def model(self) -> SlicedForCausalLM:
        """The sliced model, on the CPU, in eval mode. One that was written to a folder is loaded from there when it is
        first asked for: the run itself holds a layer of it at a time."""
        if isinstance(self._model, Path):
            self._model, _ = load_dense(os.fspath(self._model))
        return self._model

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer, self.report))

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]
