"""The next token from logits, on their device and without waiting for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slicegpt.errors import SliceGPTError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one, or drawn with the filters of transformers' `generate`.

    Attributes:
        do_sample: draw; otherwise take the likeliest token, and the other attributes have no effect.
        temperature: divides the logits, above 0.
        top_k: keep only this many likeliest tokens; 0 keeps all.
        top_p: keep only the likeliest tokens whose probabilities reach this sum, in (0, 1].
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise SliceGPTError(f"must be above 0, got {self.temperature}", "temperature")
        if self.top_k < 0:
            raise SliceGPTError(f"must be at least 0, got {self.top_k}", "top_k")
        if not 0 < self.top_p <= 1:
            raise SliceGPTError(f"must lie in (0, 1], got {self.top_p}", "top_p")

    def filtered(self, logits: Tensor) -> Tensor:
        """Float32 logits [batch, vocab_size] at this temperature, minus infinity where a filter drops the token."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Token ids [batch]."""
        if not self.do_sample:
            return logits.max(dim=-1).indices  # vectorised on a CPU, which argmax is not
        probabilities = self.filtered(logits).softmax(dim=-1)
        # The smallest of independent exponential variables of these rates is drawn with these probabilities, without
        # the host sync of torch.multinomial.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / clocks).max(dim=-1).indices
