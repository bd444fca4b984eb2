"""What `rewrite_layer` is made of: a checkpoint's own way of writing a layer, brought into the canonical form."""

from dataclasses import replace

import torch

from .base import DenseLayer, Linear, Norm


def split_rows(linear: Linear, *sizes: int) -> list[Linear]:
    """The layers of `sizes` outputs that a fused one holds one below the other; views."""
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
    return [Linear(weight, bias) for weight, bias in zip(linear.weight.split(sizes), biases, strict=True)]


def take_rows(linear: Linear, rows: torch.Tensor) -> Linear:
    """The outputs `rows` of a layer, in that order; a copy."""
    return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def scale_linear(linear: Linear, factor: float) -> Linear:
    """A layer whose output is `factor` times as large, in float64: folding still rounds once."""
    return Linear(
        linear.weight.double() * factor, None if linear.bias is None else linear.bias.double() * factor
    )


def scale_writers(layer: DenseLayer, factor: float) -> DenseLayer:
    """The layer with all that it adds to the stream `factor` times as large.

    A network whose embedding is multiplied by `s` may carry `h / s` in place of `h`: its writers are divided by `s` and
    the `eps` of its norms by `s²`, and `h / sqrt(|h|² / D + eps)` is what it was. The table, which a tied head shares,
    stays as it is.
    """
    return replace(layer, o=scale_linear(layer.o, factor), down=scale_linear(layer.down, factor))


def scale_norm(norm: Norm, factor: float) -> Norm:
    """A norm whose output is `factor` times as large, in float64."""
    bias = None if norm.bias is None else norm.bias.double() * factor
    return Norm(norm.weight.double() * factor, bias)


def neighbours_to_halves(linear: Linear, head_dim: int) -> Linear:
    """Queries or keys whose rotary pairs are neighbours `(2 i, 2 i + 1)`, reordered to pairs `(i, i + head_dim / 2)`.

    The scores do not see the order of a head's entries, as long as queries and keys share it.
    """
    pairs = torch.arange(linear.weight.shape[0], device=linear.weight.device).view(-1, head_dim // 2, 2)
    return take_rows(linear, pairs.mT.flatten())
