"""Folding norms and rotations into the linear layers around them, in float64 (paper sections 3.1 to 3.3).

With `V` [D, d] the basis of a boundary, `g`, `β` the norm's scale and shift, `M = I - 1 1ᵀ / D` for LayerNorm
families and `M = I` otherwise:

    reads the stream:    W -> sqrt(D / d) W diag(g) V,    c -> c + W β
    writes the stream:   W -> Vᵀ M W,                     c -> Vᵀ M c

(`W` is [out, in] as torch stores it). The constant `sqrt(D / d)` makes up for the stock RMSNorm that the sliced
network uses, which divides by d and not by D; see `SlicedConfig.boundary_eps`.
"""

from collections.abc import Iterator

import torch

from slicegpt.families import DenseLayer, Linear, Norm

# Canonical module name and the field of DenseLayer, for the layers that read and that write the stream.
READERS = {
    "attention": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
    "mlp": (("gate_proj", "gate"), ("up_proj", "up")),
}
WRITERS = {"attention": ("o_proj", "o"), "mlp": ("down_proj", "down")}


def centre(rows: torch.Tensor, mean_subtraction: bool) -> torch.Tensor:
    """`rows M` in float64: every row of [..., D] less its mean, or unchanged for RMSNorm families."""
    rows = rows.double()
    return rows - rows.mean(dim=-1, keepdim=True) if mean_subtraction else rows


def fold_reader(linear: Linear, norm: Norm, basis: torch.Tensor) -> Linear:
    """A layer that reads the normalised stream: norm scale, shift and rotation folded in, float64."""
    weight = linear.weight.to(basis.device, torch.float64)
    bias = _folded_bias(weight, linear.bias, norm)
    if norm.weight is not None:
        weight = weight * norm.weight.to(basis.device, torch.float64)
    dense_width, width = basis.shape
    return Linear((weight @ basis) * (dense_width / width) ** 0.5, bias)


def _folded_bias(weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm) -> torch.Tensor | None:
    """`c + W β`, on the device of `weight`, which is float64; None where there is neither."""
    bias = None if bias is None else bias.to(weight.device, torch.float64)
    if norm.bias is None:
        return bias
    shift = weight @ norm.bias.to(weight.device, torch.float64)
    return shift if bias is None else bias + shift


def fold_writer(linear: Linear, mean_subtraction: bool, device: torch.device) -> Linear:
    """A layer that writes the stream: mean subtraction folded in, at full width, float64."""
    columns = centre(linear.weight.to(device).mT, mean_subtraction)
    bias = None if linear.bias is None else centre(linear.bias.to(device), mean_subtraction)
    return Linear(columns.mT, bias)


def rotate_writer(linear: Linear, basis: torch.Tensor) -> Linear:
    """A layer that writes the stream at full width, brought onto a basis, float64."""
    bias = None if linear.bias is None else linear.bias @ basis
    return Linear((linear.weight.mT @ basis).mT, bias)


# Rows of a vocabulary-sized table that are held in float64 on the device at a time: 1 GB at D = 8192.
TABLE_ROWS = 16384


def rotated_rows(
    table: torch.Tensor, basis: torch.Tensor, mean_subtraction: bool, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """`table M V`, a table [rows, D] whose rows enter the stream, in pieces, rounded once to `dtype`."""
    for rows in table.split(TABLE_ROWS):
        yield (centre(rows.to(basis.device), mean_subtraction) @ basis).to(table.device, dtype)


def folded_head_rows(
    head: Linear, norm: Norm, basis: torch.Tensor, dtype: torch.dtype
) -> tuple[Iterator[torch.Tensor], torch.Tensor | None]:
    """An untied head: it reads the normalised stream like any other layer, only there is more of it.

    Returns:
        The rows of its weight in pieces, and its bias or None; both rounded once to `dtype`.
    """
    weights = head.weight.split(TABLE_ROWS)
    biases = [None] * len(weights) if head.bias is None else head.bias.split(TABLE_ROWS)
    bias = None
    if head.bias is not None or norm.bias is not None:
        pieces = zip(weights, biases, strict=True)
        double = (_folded_bias(rows.to(basis.device, torch.float64), own, norm) for rows, own in pieces)
        bias = torch.cat([piece.to(head.weight.device, dtype) for piece in double])

    def rows() -> Iterator[torch.Tensor]:
        for piece in weights:
            yield fold_reader(Linear(piece), norm, basis).weight.to(head.weight.device, dtype)

    return rows(), bias


def named(name: str, linear: Linear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State-dict entries of a folded layer, rounded once to the model's dtype."""
    entries = {f"{name}.weight": linear.weight.to(dtype).contiguous()}
    if linear.bias is not None:
        entries[f"{name}.bias"] = linear.bias.to(dtype)
    return entries


def activation_state(layer: DenseLayer, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """State of an MLP's activation that has weights of its own."""
    return {f"act_fn.{name}": tensor.to(device, dtype) for name, tensor in layer.activation.items()}


def reader_state(
    part: str, layer: DenseLayer, basis: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """State of the layers of `part` ("attention" or "mlp") that read the stream, in `basis`."""
    norm = layer.attention_norm if part == "attention" else layer.mlp_norm
    state: dict[str, torch.Tensor] = {}
    for name, field in READERS[part]:
        linear = getattr(layer, field)
        if linear is not None:
            state |= named(name, fold_reader(linear, norm, basis), dtype)
    if part == "mlp":
        state |= activation_state(layer, dtype, basis.device)
    if part == "attention" and layer.q_norm is not None:
        state["q_norm.weight"] = layer.q_norm.to(basis.device, dtype)
        state["k_norm.weight"] = layer.k_norm.to(basis.device, dtype)
    return state
