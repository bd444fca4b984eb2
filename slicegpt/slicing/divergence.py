"""How far another network's next-token distributions are from the dense model's: their Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from slicegpt.conversion.folding import TABLE_ROWS
from slicegpt.families import Checkpoint

# One position in so many is looked at: neighbours say nearly the same, and the head is the dearest part.
EVERY = 2


class DenseLogits:
    """The dense model's distributions `p` at some tokens, to compare other networks with the same head with.

    With `z` another network's logits and `h` what its head, `z = h Wᵀ + c`, reads,

        KL(p, softmax z) = Σ p log p - h (Σ p W)ᵀ - Σ p c + log Σ exp z

    so that of another network only the last term takes a pass over the vocabulary. Products are in float32 (float64 for
    streams of float64), sums over the vocabulary in pieces of `TABLE_ROWS`, what is subtracted in float64.

    Args:
        checkpoint: the dense model's; its final norm and head.
        stream: the dense model's after its last block, [windows, tokens, D], on the device to compute on.
        mask: bool [windows, tokens], the tokens that are not padding; None: all are.
        eps: of the final norm.
    """

    def __init__(self, checkpoint: Checkpoint, stream: torch.Tensor, mask: torch.Tensor | None, eps: float):
        self.device, self.eps = stream.device, eps
        self.dtype = torch.float64 if stream.dtype == torch.float64 else torch.float32
        length = stream.shape[1]
        places = torch.arange(length, device=self.device) % EVERY == (length - 1) % EVERY
        wanted = places.expand(stream.shape[:2])
        self.wanted = wanted if mask is None else wanted & mask
        norm, self.checkpoint = checkpoint.final_norm, checkpoint
        self.scale, self.shift = (
            None if part is None else part.to(self.device, self.dtype, copy=True)
            for part in (norm.weight, norm.bias)
        )
        states = self.read(stream)
        normaliser = torch.full((len(states),), -torch.inf, dtype=torch.float64, device=self.device)
        for weight, bias in self._pieces():
            normaliser = torch.logaddexp(normaliser, _normaliser(states, weight, bias))
        del weight, bias  # the head is read anew
        self.mean = torch.zeros(states.shape, dtype=torch.float64, device=self.device)  # Σ p W
        self.constant = torch.zeros_like(normaliser)  # Σ p log p - Σ p c
        for weight, bias in self._pieces():
            logits = functional.linear(states, weight, bias)
            logs = logits.double() - normaliser[:, None]
            shares = logs.exp()
            self.constant += (shares * logs).sum(dim=1)
            self.mean += (shares.to(self.dtype) @ weight).double()
            if bias is not None:
                self.constant -= shares @ bias.double()

    def read(self, stream: torch.Tensor) -> torch.Tensor:
        """What the head reads at the tokens that are looked at, [n, D]."""
        rows = stream[self.wanted].to(self.dtype)
        rows = functional.rms_norm(rows, rows.shape[-1:], self.scale, self.eps)
        return rows if self.shift is None else rows + self.shift

    def divergences(self, count: int, stream_of: Callable[[int], torch.Tensor]) -> list[float]:
        """The mean over the tokens, in nats, of each of `count` networks.

        Args:
            stream_of: their streams after the last block, as the dense model's; asked for once for every piece of the
                vocabulary.
        """
        sums = torch.full((count, len(self.mean)), -torch.inf, dtype=torch.float64, device=self.device)
        linear = torch.zeros_like(sums)
        for number, (weight, bias) in enumerate(self._pieces()):
            for index in range(count):
                states = self.read(stream_of(index))
                sums[index] = torch.logaddexp(sums[index], _normaliser(states, weight, bias))
                if number == 0:
                    linear[index] = (states.double() * self.mean).sum(dim=1)
        return (self.constant - linear + sums).mean(dim=1).tolist()

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Rows of the head and of its bias, on the device; the head is read for it, and not kept."""
        head = self.checkpoint.head
        for start in range(0, len(head.weight), TABLE_ROWS):
            rows = slice(start, start + TABLE_ROWS)
            bias = None if head.bias is None else head.bias[rows].to(self.device, self.dtype)
            yield head.weight[rows].to(self.device, self.dtype), bias


def _normaliser(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(states, weight, bias).logsumexp(dim=1).double()
