"""A dense Hugging Face model as the canonical network: the same function, full width, identity shortcuts."""

import torch
from transformers import PreTrainedModel

from slicegpt.conversion.folding import (
    OUTPUT_NORMS,
    READERS,
    TABLE_ROWS,
    WRITERS,
    activation_state,
    centre,
    fold_writer,
    mixture_state,
    named,
    output_norm_weight,
    stacked_writers,
)
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import DenseLayer, Linear, Norm, canonical_fields, checkpoint_of
from slicegpt.modeling import SlicedConfig, SlicedForCausalLM
from slicegpt.modeling.layers import build_rotary

_TABLE = "model.embed_tokens."


def build_model(config: SlicedConfig, state: dict[str, torch.Tensor]) -> SlicedForCausalLM:
    """A model holding the tensors of `state` themselves (no copy, no initialisation), in eval mode."""
    with torch.device("meta"):
        model = SlicedForCausalLM(config)
    if config.tie_word_embeddings:
        table = {name: tensor for name, tensor in state.items() if name.startswith(_TABLE)}
        state = state | {name.replace(_TABLE, "lm_head.", 1): tensor for name, tensor in table.items()}
    model.load_state_dict(state, assign=True)
    if model.model.rotary_emb is not None:
        model.model.rotary_emb = build_rotary(config)
    model.tie_weights()
    return model.eval()


def to_canonical(model: PreTrainedModel) -> SlicedForCausalLM:
    """Fold the norms of a supported dense model into its linear layers; a sliced model comes back as it is.

    What slicing at full width gives, without its products with identity bases: the norms' scales and shifts, and the
    mean subtraction of LayerNorm families, are folded in float64 and rounded once to the model's dtype. The folded
    layers take as much memory as the model's, on the same device.

    Errors: `SliceGPTError` for a model of no supported family.
    """
    if isinstance(model, SlicedForCausalLM):
        return model
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, fields["dense_hidden_size"]), Shape())
    with torch.no_grad():
        canonical = build_model(config, _folded_state(model, config)).to(model.device)
    canonical.generation_config = model.generation_config
    return canonical


def _folded_state(model: PreTrainedModel, config) -> dict[str, torch.Tensor]:
    checkpoint, dtype = checkpoint_of(model), model.dtype
    centred = checkpoint.family.mean_subtraction
    table, positions = checkpoint.embedding, checkpoint.positions
    state = {"model.embed_tokens.weight": table.detach()}
    if config.embed_projection:
        identity = torch.eye(config.dense_hidden_size, device=table.device)
        state["model.embed_projection.weight"] = centre(identity, centred).mT.to(dtype).contiguous()
    elif centred:
        state["model.embed_tokens.weight"] = _centred_table(table)
    if positions is not None:
        state["model.embed_positions.weight"] = _centred_table(positions) if centred else positions.detach()
    for index in range(config.num_hidden_layers):
        state |= _folded_layer(f"model.layers.{index}", checkpoint.layer(index), centred, dtype)
    norm, head = checkpoint.final_norm, checkpoint.head
    if not config.tie_word_embeddings:
        return state | named("lm_head", _fold_reader(head, norm), dtype)
    scale = torch.ones(table.shape[1], device=table.device) if norm.weight is None else norm.weight
    state["model.norm.weight"] = scale.to(dtype)
    if norm.bias is not None:
        state["model.norm.bias"] = norm.bias.to(dtype)
    if head.bias is not None:
        state["lm_head.bias"] = head.bias.to(dtype)
    return state


def _folded_layer(root: str, layer: DenseLayer, centred: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for module, part, norm in (
        ("self_attn", "attention", layer.attention_norm),
        ("mlp", "mlp", layer.mlp_norm),
    ):
        if part == "mlp" and layer.mixture is not None:
            state |= _folded_mixture(f"{root}.mlp", layer, centred, dtype)
            continue
        for name, field in READERS[part]:
            linear = getattr(layer, field)
            if linear is not None:
                state |= named(f"{root}.{module}.{name}", _fold_reader(linear, norm), dtype)
        name, field = WRITERS[part]
        writer = getattr(layer, field)
        if centred:
            bias = None if writer.bias is None else centre(writer.bias, True)
            writer = Linear(centre(writer.weight.mT, True).mT, bias)
        state |= named(f"{root}.{module}.{name}", writer, dtype)
        scale = output_norm_weight(part, layer, writer.weight.device)
        if scale is not None:
            state[f"{root}.{OUTPUT_NORMS[part]}.weight"] = scale.to(dtype)
    activation = activation_state(layer, dtype, layer.o.weight.device)
    state |= {f"{root}.mlp.{name}": tensor for name, tensor in activation.items()}
    if layer.q_norm is not None:
        state |= {
            f"{root}.self_attn.q_norm.weight": layer.q_norm.to(dtype),
            f"{root}.self_attn.k_norm.weight": layer.k_norm.to(dtype),
        }
    if layer.sinks is not None:
        state[f"{root}.self_attn.sinks"] = layer.sinks
    state |= {f"{root}.self_attn.{name}": tensor.to(dtype) for name, tensor in layer.expansion.items()}
    return state


def _folded_mixture(
    root: str, layer: DenseLayer, centred: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    mixture, device = layer.mixture, layer.o.weight.device
    state = mixture_state(mixture, layer.mlp_norm, None, dtype, device)
    writers = [fold_writer(mixture.expert(number).down, centred, device) for number in range(mixture.count)]
    state |= stacked_writers(writers, dtype)
    if mixture.shared is not None:
        state |= named("shared_expert.down_proj", fold_writer(mixture.shared.down, centred, device), dtype)
    return {f"{root}.{name}": tensor for name, tensor in state.items()}


def _fold_reader(linear: Linear, norm: Norm) -> Linear:
    """`folding.fold_reader` with the identity as basis; in pieces, for a head has a vocabulary of rows."""
    pieces = []
    for rows in linear.weight.split(TABLE_ROWS):
        folded = rows if norm.weight is None else (rows.double() * norm.weight.double()).to(rows.dtype)
        pieces.append(folded)
    weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    bias = linear.bias
    if norm.bias is not None:
        shift = torch.cat([rows.double() @ norm.bias.double() for rows in linear.weight.split(TABLE_ROWS)])
        bias = shift if bias is None else bias.double() + shift
    return Linear(weight, bias)


def _centred_table(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([centre(rows, True).to(table.dtype) for rows in table.split(TABLE_ROWS)])
