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

    so that of another network only the last term takes a pass over the vocabulary; where logits are capped, `Σ p z`
    does so, too. Products are in float32 (float64 for streams of float64), sums over the vocabulary in pieces of
    `TABLE_ROWS`, what is subtracted in float64.

    Args:
        checkpoint: the dense model's; its final norm and head.
        stream: the dense model's after its last block, [windows, tokens, D], on the device to compute on.
        mask: bool [windows, tokens], the tokens that are not padding; None: all are.
        eps: of the final norm.
        cap: logits become `cap tanh(z / cap)`; None: they stay.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stream: torch.Tensor,
        mask: torch.Tensor | None,
        eps: float,
        cap: float | None = None,
    ):
        self.device, self.eps, self.cap = stream.device, eps, cap
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
        self.states = self.read(stream)
        self.normaliser = torch.full((len(self.states),), -torch.inf, dtype=torch.float64, device=self.device)
        for weight, bias in self._pieces():
            self.normaliser = torch.logaddexp(
                self.normaliser, self._logits(self.states, weight, bias).logsumexp(dim=1).double()
            )
        del weight, bias  # the head is read anew
        self.mean = torch.zeros(self.states.shape, dtype=torch.float64, device=self.device)  # Σ p W
        self.constant = torch.zeros_like(self.normaliser)  # Σ p log p - Σ p c
        for weight, bias in self._pieces():
            shares, logs = self._shares(weight, bias)
            self.constant += (shares * logs).sum(dim=1)
            if cap is None:
                self.mean += (shares.to(self.dtype) @ weight).double()
                self.constant -= 0 if bias is None else shares @ bias.double()

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
        expected = torch.zeros_like(sums)  # Σ p z - Σ p c
        for number, (weight, bias) in enumerate(self._pieces()):
            shares = None if self.cap is None else self._shares(weight, bias)[0]
            for index in range(count):
                states = self.read(stream_of(index))
                logits = self._logits(states, weight, bias)
                sums[index] = torch.logaddexp(sums[index], logits.logsumexp(dim=1).double())
                if shares is not None:
                    expected[index] += (shares * logits).sum(dim=1)
                elif number == 0:
                    expected[index] = (states.double() * self.mean).sum(dim=1)
        return (self.constant - expected + sums).mean(dim=1).tolist()

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Rows of the head and of its bias, on the device; the head is read for it, and not kept."""
        head = self.checkpoint.head
        for start in range(0, len(head.weight), TABLE_ROWS):
            rows = slice(start, start + TABLE_ROWS)
            bias = None if head.bias is None else head.bias[rows].to(self.device, self.dtype)
            yield head.weight[rows].to(self.device, self.dtype), bias

    def _logits(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = functional.linear(states, weight, bias)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _shares(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`p` and `log p` of some rows of the vocabulary, float64."""
        logs = self._logits(self.states, weight, bias).double() - self.normaliser[:, None]
        return logs.exp(), logs
