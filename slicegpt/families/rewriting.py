"""What `rewrite_layer` is made of: a checkpoint's own way of writing a layer, brought into the canonical form.

And what `StockForm.restore_layer` is made of, which undoes it.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from .base import DenseLayer, Linear, Norm, head_dim_of


def split_rows(linear: Linear, *sizes: int) -> list[Linear]:
    """The layers of `sizes` outputs that a fused one holds one below the other; views."""
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
    return [Linear(weight, bias) for weight, bias in zip(linear.weight.split(sizes), biases, strict=True)]


def join_rows(*linears: Linear) -> Linear:
    """One layer with the outputs of all, one below the other: undoes `split_rows`."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    weight = torch.cat([linear.weight for linear in linears])
    return Linear(weight, torch.cat(biases) if len(biases) == len(linears) else None)


def fuse_queries(layer: DenseLayer, rows: torch.Tensor | None = None) -> DenseLayer:
    """A layer with queries, keys and values in one matrix.

    Args:
        rows: where the outputs of queries, keys and values, in this order, stand in it; None: as they come.
    """
    fused = join_rows(layer.q, layer.k, layer.v)
    if rows is not None:
        fused = take_rows(fused, rows.argsort())
    return replace(layer, q=fused, k=fused, v=fused)


def fuse_gate(layer: DenseLayer) -> DenseLayer:
    """A layer with gate and up in one matrix."""
    fused = join_rows(layer.gate, layer.up)
    return replace(layer, gate=fused, up=fused)


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


def scale_output_norms(layer: DenseLayer, factor: float) -> DenseLayer:
    """`scale_writers` of a layer with norms behind its blocks: their scales take the factor."""
    return replace(
        layer,
        attention_output_norm=scale_norm(layer.attention_output_norm, factor),
        mlp_output_norm=scale_norm(layer.mlp_output_norm, factor),
    )


def one_plus(norm: Norm, config: PreTrainedConfig | None = None) -> Norm:
    """A norm whose checkpoint holds its scale less 1, in float64."""
    return Norm(1 + norm.weight.double(), norm.bias)


def one_plus_all(layer: DenseLayer, config: PreTrainedConfig | None = None) -> DenseLayer:
    """`one_plus` of every norm that a layer has, those behind its blocks and those of queries and keys among them."""
    norms = ("attention_norm", "mlp_norm", "attention_output_norm", "mlp_output_norm")
    scales = {
        name: 1 + scale.double()
        for name in ("q_norm", "k_norm")
        if (scale := getattr(layer, name)) is not None
    }
    return replace(layer, **{name: one_plus(getattr(layer, name)) for name in norms}, **scales)


def one_plus_norms(layer: DenseLayer, config: PreTrainedConfig | None = None) -> DenseLayer:
    """`one_plus` of both norms of a layer."""
    return replace(layer, attention_norm=one_plus(layer.attention_norm), mlp_norm=one_plus(layer.mlp_norm))


def neighbours_to_halves(linear: Linear, head_dim: int, rotated: int | None = None) -> Linear:
    """Queries or keys whose rotary pairs are neighbours `(2 i, 2 i + 1)`, reordered to pairs `(i, i + rotated / 2)`.

    The scores do not see the order of a head's entries, as long as queries and keys share it.

    Args:
        rotated: entries of a head that are rotated, its first ones; None: all.
    """
    return take_rows(linear, _halves(linear, head_dim, rotated))


def halves_to_neighbours(linear: Linear, head_dim: int, rotated: int | None = None) -> Linear:
    """Undoes `neighbours_to_halves`."""
    return take_rows(linear, _halves(linear, head_dim, rotated).argsort())


def _halves(linear: Linear, head_dim: int, rotated: int | None) -> torch.Tensor:
    """Where the entries of every head stand among neighbours, in the order of halves."""
    rotated = head_dim if rotated is None else rotated
    heads = torch.arange(linear.weight.shape[0], device=linear.weight.device).view(-1, head_dim)
    turned = heads[:, :rotated].unflatten(1, (-1, 2)).mT.flatten(1)
    return torch.cat((turned, heads[:, rotated:]), dim=1).flatten()


def pairs_of_neighbours(
    layer: DenseLayer, config: PreTrainedConfig, rotated: int | None = None
) -> DenseLayer:
    """A layer whose rotary positions turn neighbours; see `neighbours_to_halves`."""
    head_dim = head_dim_of(config)
    q, k = (neighbours_to_halves(linear, head_dim, rotated) for linear in (layer.q, layer.k))
    return replace(layer, q=q, k=k)


def back_to_neighbours(layer: DenseLayer, config: PreTrainedConfig, rotated: int | None = None) -> DenseLayer:
    """Undoes `pairs_of_neighbours`."""
    head_dim = head_dim_of(config)
    q, k = (halves_to_neighbours(linear, head_dim, rotated) for linear in (layer.q, layer.k))
    return replace(layer, q=q, k=k)


def transposed(linear: Linear) -> Linear:
    """A layer whose checkpoint holds its weight as [in, out]; a view."""
    return Linear(linear.weight.mT, linear.bias)
