"""Folding norms and rotations into the linear layers around them, in float64 (paper sections 3.1 to 3.3).

With `V` [D, d] the basis of a boundary, `g`, `β` the norm's scale and shift, `M = I - 1 1ᵀ / D` for LayerNorm
families and `M = I` otherwise:

    reads the stream:    W -> sqrt(D / d) W diag(g) V,    c -> c + W β
    writes the stream:   W -> Vᵀ M W,                     c -> Vᵀ M c

(`W` is [out, in] as torch stores it). The constant `sqrt(D / d)` makes up for the stock RMSNorm that the sliced
network uses, which divides by d and not by D; see `SlicedConfig.boundary_eps`.
"""

from collections.abc import Iterator, Sequence

import torch

from slicegpt.families import DenseLayer, Linear, Mixture, Norm

# Canonical module name and the field of DenseLayer, for the layers that read and that write the stream.
READERS = {
    "attention": (
        ("q_proj", "q"),
        ("k_proj", "k"),
        ("v_proj", "v"),
        ("q_a_proj", "q_a"),
        ("kv_a_proj_with_mqa", "kv_a"),
    ),
    "mlp": (("gate_proj", "gate"), ("up_proj", "up")),
}
WRITERS = {"attention": ("o_proj", "o"), "mlp": ("down_proj", "down")}


def centre(rows: torch.Tensor, mean_subtraction: bool) -> torch.Tensor:
    """`rows M` in float64: every row of [..., D] less its mean, or unchanged for RMSNorm families."""
    rows = rows.double()
    return rows - rows.mean(dim=-1, keepdim=True) if mean_subtraction else rows


def fold_reader(linear: Linear, norm: Norm, basis: torch.Tensor | None) -> Linear:
    """A layer that reads the normalised stream: norm scale, shift and rotation folded in, float64 [out, d].

    Args:
        basis: None for the identity.
    """
    weight = linear.weight.to(linear.weight.device if basis is None else basis.device, torch.float64)
    bias = _folded_bias(weight, linear.bias, norm)
    if norm.weight is not None:
        weight = weight * norm.weight.to(weight.device, torch.float64)
    if basis is None:
        return Linear(weight, bias)
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
    """A layer that writes the stream, at full width: mean subtraction folded in, float64; without one the weight stays
    as it is, for a large one takes several times less memory so."""
    weight = linear.weight.to(device)
    if mean_subtraction:
        weight = centre(weight.mT, True).mT
    bias = None if linear.bias is None else centre(linear.bias.to(device), mean_subtraction)
    return Linear(weight, bias)


def rotate_writer(linear: Linear, basis: torch.Tensor) -> Linear:
    """A layer that writes the stream at full width, brought onto a basis, float64."""
    bias = None if linear.bias is None else linear.bias @ basis
    return Linear((linear.weight.to(basis.device, torch.float64).mT @ basis).mT, bias)


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


# Of a layer that reads the stream so many bytes are in float64 on the device at a time; one that is no larger is
# multiplied in one piece.
READER_BYTES = 1 << 28


def folded_reader(
    linear: Linear, norm: Norm, basis: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> Linear:
    """`fold_reader` in pieces of rows, rounded once to `dtype`, on `device`.

    Args:
        basis: None for the identity, which nothing is multiplied with.
    """
    step = max(1, READER_BYTES // (8 * linear.weight.shape[1]))
    weights = linear.weight.split(step)
    biases = [None] * len(weights) if linear.bias is None else linear.bias.split(step)
    pieces = []
    for weight, bias in zip(weights, biases, strict=True):
        piece = fold_reader(Linear(weight.to(device), bias), norm, basis)
        pieces.append(Linear(piece.weight.to(dtype), None if piece.bias is None else piece.bias.to(dtype)))
    bias = None if pieces[0].bias is None else torch.cat([piece.bias for piece in pieces])
    return Linear(torch.cat([piece.weight for piece in pieces]), bias)


def named(name: str, linear: Linear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State-dict entries of a folded layer, rounded once to the model's dtype."""
    entries = {f"{name}.weight": linear.weight.to(dtype).contiguous()}
    if linear.bias is not None:
        entries[f"{name}.bias"] = linear.bias.to(dtype)
    return entries


def activation_state(layer: DenseLayer, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """State of an MLP's activation that has weights of its own."""
    return {f"act_fn.{name}": tensor.to(device, dtype) for name, tensor in layer.activation.items()}


OUTPUT_NORMS = {"attention": "attention_output_norm", "mlp": "mlp_output_norm"}


def output_norm_weight(part: str, layer: DenseLayer, device: torch.device) -> torch.Tensor | None:
    """The scale [D] of the norm that what `part` writes passes, float64; None where there is none."""
    norm = getattr(layer, OUTPUT_NORMS[part])
    return None if norm is None else norm.weight.to(device, torch.float64)


def reader_state(
    part: str, layer: DenseLayer, basis: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """State of the layers of `part` ("attention" or "mlp") that read the stream, in `basis` (None: the identity)."""
    norm = layer.attention_norm if part == "attention" else layer.mlp_norm
    if part == "mlp" and layer.mixture is not None:
        return mixture_state(layer.mixture, norm, basis, dtype, device)
    state: dict[str, torch.Tensor] = {}
    for name, field in READERS[part]:
        linear = getattr(layer, field)
        if linear is not None:
            state |= named(name, folded_reader(linear, norm, basis, dtype, device), dtype)
    if part == "mlp":
        state |= activation_state(layer, dtype, device)
    if part == "attention" and layer.q_norm is not None:
        state["q_norm.weight"] = layer.q_norm.to(device, dtype)
        state["k_norm.weight"] = layer.k_norm.to(device, dtype)
    if part == "attention" and layer.sinks is not None:
        state["sinks"] = layer.sinks.to(device, dtype)
    if part == "attention":
        state |= {name: tensor.to(device, dtype) for name, tensor in layer.expansion.items()}
    return state


def mixture_state(
    mixture: Mixture, norm: Norm, basis: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """State of a mixture's layers that read the stream: router, experts one after the other, shared expert."""

    def folded(linear: Linear) -> Linear:
        return folded_reader(linear, norm, basis, dtype, device)

    state = named("gate", folded(mixture.router), dtype)
    if mixture.correction is not None:
        state["gate.e_score_correction_bias"] = mixture.correction.to(
            device, torch.promote_types(dtype, torch.float32)
        )
    if mixture.shared is not None:
        for name, linear in (("gate_proj", mixture.shared.gate), ("up_proj", mixture.shared.up)):
            state |= named(f"shared_expert.{name}", folded(linear), dtype)
        if mixture.shared_gate is not None:
            state |= named("shared_expert_gate", folded(mixture.shared_gate), dtype)
    for number in range(mixture.count):
        expert = mixture.expert(number)
        gate, up = folded(expert.gate), folded(expert.up)
        neurons = len(gate.weight)
        if number == 0:
            rows = (mixture.count, 2 * neurons)
            weights = torch.empty(*rows, gate.weight.shape[1], dtype=dtype, device=device)
            state["experts.gate_up_proj"] = weights
            if gate.bias is not None:
                state["experts.gate_up_proj_bias"] = torch.empty(rows, dtype=dtype, device=device)
        for half, linear in ((slice(neurons), gate), (slice(neurons, None), up)):
            weights[number, half] = linear.weight
            if linear.bias is not None:
                state["experts.gate_up_proj_bias"][number, half] = linear.bias
    return state


def stacked_writers(writers: Sequence[Linear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State-dict entries of the experts' output layers, side by side, rounded once to the model's dtype."""
    entries = {"experts.down_proj": torch.stack([writer.weight.to(dtype) for writer in writers])}
    if writers[0].bias is not None:
        entries["experts.down_proj_bias"] = torch.stack([writer.bias.to(dtype) for writer in writers])
    return entries
