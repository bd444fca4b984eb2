"""The weights of a `SlicedForCausalLM` laid out for `norm_linear` and `rotate_add`: two GEMMs a block.

One input GEMM holds the rows of v, k, q and the factor Fᵀ of a compact shortcut, or of gate, up and the factor; one
output GEMM holds `[W_out | -F]`. The order v, k, q, z lets attention write its result over q, where it lies beside
z: the output GEMM reads `[attended | z]` without a copy. Parallel blocks have two input GEMMs, whose activations
differ. Weights of 8 and 4 bits stay what they are where there are kernels for them (`PanelWeight`), and are made dense
elsewhere; a shortcut's factor is the part of them that is not quantized.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from slicegpt.errors import SliceGPTError
from slicegpt.modeling import CompactShortcut, SlicedConfig, SlicedForCausalLM
from slicegpt.modeling.experts import SlicedMoE
from slicegpt.modeling.latent_attention import SlicedLatentAttention
from slicegpt.modeling.layers import (
    Constant,
    FinalNorm,
    LayerRotaryEmbeddings,
    SlicedAttention,
    SlicedMLP,
)
from slicegpt.modeling.quantized import QuantizedWeight
from slicegpt.ops import many_rows, quantized
from slicegpt.ops.contracts import GATED
from slicegpt.ops.panels import PanelWeight
from slicegpt.runtime.experts import PackedMixture
from slicegpt.runtime.linear_weights import WeightReader, with_factor, with_negative_factor
from slicegpt.runtime.one_product import can_be_joined
from slicegpt.runtime.packed import PackedAttention, PackedBlock, PackedNetwork, Projection
from slicegpt.runtime.rounding import rounding
from slicegpt.runtime.weight_memory import WeightMemory

ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}

# Their frequencies change with the length of the sequence, so the angles cannot be tabulated.
UNSUPPORTED_ROPE = ("dynamic",)


def position_limit(config: SlicedConfig) -> tuple[int, str | None]:
    """Tokens of a sequence that the runtime takes, and what sets a hard limit (None: rotary positions go on).

    LongRoPE takes other frequencies for sequences past its original length, for the tokens before as well, whose keys
    are in the cache by then: up to there it is one table. Queries that grow with their position do not, up to a length.
    """
    if config.position_embedding == "learned":
        return config.max_position_embeddings, "the model's learned positions"
    if config.longrope_length is not None:
        return config.longrope_length, "the length at which the model's LongRoPE changes its frequencies"
    if config.query_scaling is not None:
        return config.query_scaling[1], "the length past which the model's queries grow"
    return config.max_position_embeddings, None


def check_one_device(what: str, model: nn.Module) -> None:
    """Refuse a model that is split between devices or offloaded: the hooks of its layers would not be called."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise SliceGPTError(f"must be on one device, got {', '.join(devices)}", "model")


def weight_reader(model: nn.Module, weights: str | None = None) -> WeightReader:
    """Reads the model's weights: those of 8 and 4 bits as they are where there are kernels for them.

    weights: "int8" or "int4" rounds the others to nearest, see `slicegpt.runtime.rounding`.

    Errors: `SliceGPTError` for other values of `weights`, and where there are no such kernels.
    """
    dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
    device = next(model.parameters()).device
    if weights is not None and model.config.num_experts:
        raise SliceGPTError(f"{weights!r} has no kernels for experts; leave it out", "weights")
    panels = device.type == "cpu" and quantized.is_supported(None, dtype)
    if weights is None:
        return WeightReader(panels=panels)
    codes_of = rounding(weights)
    if not panels:
        raise SliceGPTError(
            f"{weights!r} needs the CPU's kernels and float16, bfloat16 or float32, got {dtype} on {device}",
            "weights",
        )
    return WeightReader(codes_of)


@torch.no_grad()
def pack(
    model: SlicedForCausalLM,
    max_positions: int | None = None,
    release: bool = False,
    reader: WeightReader | None = None,
) -> PackedNetwork:
    """Pack the weights on the model's device; embedding and head are shared with the model, unless it is released.

    Args:
        model: in float16, bfloat16, float32 or float64.
        max_positions: rows of the rotary table; `position_limit` where not given.
        release: free the weights of each layer and of the head in `model` once they are packed, so that they are never
            held twice. The model cannot be used afterwards.
        reader: reads the weights; None: as they are stored.

    Errors: `SliceGPTError` for an activation or a rotary variant that the fused operators do not have, and for a model
    that is not on one device.
    """
    check_one_device("runtime", model)
    config, trunk = model.config, model.model
    like = next(trunk.embed_tokens.parameters())
    reader = reader or weight_reader(model)
    embedding = reader.table(trunk.embed_tokens)
    memory = WeightMemory() if like.device.type == "cpu" else None
    dtype, tables = embedding.dtype, []
    empty = torch.empty(0, dtype=dtype, device=like.device)
    for one in rotary_embeddings(trunk.rotary_emb):
        if one.rope_type in UNSUPPORTED_ROPE:
            raise SliceGPTError(f"rope type {one.rope_type!r} is not supported; use the plain model", "model")
        tables.append(rotary_table(one, empty, max_positions or position_limit(config)[0]))
    made_dense = not reader.panels and any(isinstance(one, QuantizedWeight) for one in model.modules())
    blocks: list[PackedBlock] = []
    for index, layer in enumerate(trunk.layers):
        packed = pack_layer(config, index, layer, reader)
        blocks += packed if memory is None else [_copied(block, memory) for block in packed]
        if release:
            layer.to("meta")
    embed_bias, blocks = without_constants(blocks)
    scale, head_projection, head = _pack_head(model, embedding, reader)
    # A head is the model's own memory: it is copied where that is given up, and where it was packed anyway.
    if memory is not None and (release or isinstance(head.weight, PanelWeight)):
        tied = head.weight is embedding
        head = replace(head, weight=memory.copy(head.weight))
        embedding = head.weight if tied else embedding
        if release:
            for table in (model.lm_head, *([trunk.embed_tokens] if tied else [])):
                table.to("meta")
    projection, positions = trunk.embed_projection, trunk.embed_positions
    return PackedNetwork(
        config=config,
        dtype=dtype,
        device=like.device,
        embedding=embedding,
        embed_projection=projection.weight.detach() if isinstance(projection, nn.Linear) else None,
        positions=None if positions is None else positions.weight.detach(),
        embed_bias=embed_bias,
        rotary=tuple(tables),
        blocks=blocks,
        final_scale=scale,
        final_eps=trunk.norm.eps,
        head_projection=head_projection,
        head=head,
        made_dense=made_dense,
    )


def _copied(block: PackedBlock, memory: WeightMemory) -> PackedBlock:
    """The block with its weights in `memory`, in the order in which they are read."""
    inputs = tuple(replace(one, weight=memory.copy(one.weight)) for one in block.inputs)
    factor = None if block.factor is None else inputs[-1].weight[-len(block.factor) :]
    if block.joint is not None:
        return replace(block, inputs=inputs, factor=factor).with_joint(memory.copy(block.joint))
    shortcut = None if block.shortcut is None else memory.copy(block.shortcut)
    return replace(block, inputs=inputs, output=memory.copy(block.output), shortcut=shortcut, factor=factor)


@torch.no_grad()
def pack_layer(
    config: SlicedConfig, index: int, layer: nn.Module, reader: WeightReader
) -> tuple[PackedBlock, ...]:
    """The one or two blocks of decoder layer `index`.

    Errors: `SliceGPTError` for an activation that the fused operators do not have, and for latent attention.
    """
    if isinstance(layer.self_attn, SlicedLatentAttention):
        raise SliceGPTError(
            "latent attention (MLA) is not supported: its cache holds no keys and values; use the plain model",
            "model",
        )
    if (config.swiglu_limit is None and config.hidden_act not in ACTIVATION_NAMES) or (
        config.gated_mlp and f"{ACTIVATION_NAMES[config.hidden_act]}_gated" not in GATED
    ):
        gated = "gated " if config.gated_mlp else ""
        raise SliceGPTError(
            f"{gated}activation {config.hidden_act!r} is not supported; use the plain model", "model"
        )
    if config.parallel_blocks:
        return (_pack_block(config, reader, index, (layer.self_attn, layer.mlp), layer.shortcut, None),)
    attention = (layer.self_attn,), layer.attention_shortcut, layer.attention_output_norm
    return (
        _pack_block(config, reader, 2 * index, *attention),
        _pack_block(config, reader, 2 * index + 1, (layer.mlp,), layer.mlp_shortcut, layer.mlp_output_norm),
    )


def without_constants(blocks: list[PackedBlock]) -> tuple[Tensor | None, tuple[PackedBlock, ...]]:
    """The same blocks; what only adds a constant to the stream is added to the bias of the block before it, unless a
    norm stands behind that.

    Returns:
        What is to be added to the stream before the first block, [d] or None, and the blocks.
    """
    first: Tensor | None = None
    kept: list[PackedBlock] = []
    for block in blocks:
        if not block.is_constant or (kept and kept[-1].output_norm is not None):
            kept.append(block)
        elif kept:
            kept[-1] = replace(kept[-1], output_bias=_sum_of(kept[-1].output_bias, block.output_bias))
        else:
            first = _sum_of(first, block.output_bias)
    return first, tuple(kept)


def _sum_of(*biases: Tensor | None) -> Tensor:
    """Rounded once."""
    there = [bias for bias in biases if bias is not None]
    return sum(bias.double() for bias in there).to(there[0].dtype)


def rotary_embeddings(module: nn.Module | None) -> list[nn.Module]:
    """A network's rotary embeddings, one for each of its `rope_settings`."""
    if module is None:
        return []
    return list(module.children()) if isinstance(module, LayerRotaryEmbeddings) else [module]


def rotary_table(rotary_emb: nn.Module, like: Tensor, positions: int) -> Tensor:
    """Cosines and sines of every position, [positions, 2, rotary_dim] in the dtype of `like`.

    The first half of the sines is negative: `x cos + roll(x, rotary_dim / 2) sin` turns the pairs.
    """
    ids = torch.arange(positions, device=like.device)[None]
    cos, sin = (table[0] for table in rotary_emb(like[:0], ids))
    sin[:, : sin.shape[1] // 2].neg_()
    return torch.stack((cos, sin), dim=1)


def _pack_block(
    config: SlicedConfig,
    reader: WeightReader,
    boundary: int,
    modules: tuple[nn.Module, ...],
    shortcut: nn.Module,
    output_norm: nn.Module | None,
) -> PackedBlock:
    width, next_width = config.boundary_widths[boundary : boundary + 2]
    inputs, writers, constants, factor, mixture = [], [], [], None, None
    if isinstance(modules[0], SlicedMoE):
        mixture = _pack_mixture(config, width, config.boundary_eps(boundary), modules[0])
        modules = () if modules[0].shared_expert is None else (modules[0].shared_expert,)
    for module in modules:
        if isinstance(module, Constant):
            constants.append(module.bias)
            continue
        if isinstance(module, SlicedAttention):
            inputs.append(_pack_attention(config, reader, module))
            writers.append(module.o_proj)
        else:
            inputs.append(_pack_mlp(config, reader, module))
            writers.append(module.down_proj)
    like = mixture.module.experts.down_proj if mixture is not None else constants[0] if constants else None
    output = reader.beside(writers) if writers else like.detach().new_empty(next_width, 0)
    biases = [*constants, *(writer.bias for writer in writers if writer.bias is not None)]
    if isinstance(shortcut, CompactShortcut) and len(shortcut.factor):
        # z = h F are the last columns of the last input GEMM; -Fᵀ brings them back to h's columns.
        if inputs:
            last = inputs[-1]
            inputs[-1] = replace(last, weight=with_factor(last.weight, shortcut.factor))
            if not isinstance(last.weight, PanelWeight) and not isinstance(output, PanelWeight):
                factor = inputs[-1].weight[len(last.weight) :]
        else:
            factor = shortcut.factor.detach()
            inputs.append(Projection(factor, None, 0, "none"))
        output = with_negative_factor(output, shortcut.factor, shortcut.padding)
    packed = PackedBlock(
        inputs=tuple(inputs),
        width=width,
        eps=config.boundary_eps(boundary) if config.pre_norm else None,
        output=output,
        output_bias=sum(biases) if biases else None,
        shortcut=shortcut.weight.detach() if isinstance(shortcut, nn.Linear) else None,
        factor=factor,
        output_norm=output_norm.weight.detach() if isinstance(output_norm, nn.RMSNorm) else None,
        inner_eps=config.inner_norm_eps,
        mixture=mixture,
    )
    if not can_be_joined(packed) or not many_rows.joins_weights(packed.shortcut.device):
        return packed
    return packed.with_joint(torch.cat((packed.output, packed.shortcut), dim=1))


def _pack_mixture(config: SlicedConfig, width: int, eps: float, module: SlicedMoE) -> PackedMixture:
    clamped = config.swiglu_limit is not None
    activation = None if clamped else f"{ACTIVATION_NAMES[config.hidden_act]}_gated"
    return PackedMixture.of(module, activation, width, eps, config.shared_expert_intermediate_size)


def _pack_attention(config: SlicedConfig, reader: WeightReader, module: SlicedAttention) -> Projection:
    modules = (module.v_proj, module.k_proj, module.q_proj)
    weight = reader.below(modules)
    key_heads = module.k_proj.out_features // config.head_dim
    heads = module.q_proj.out_features // config.head_dim
    bias = norm = whole_norms = None
    if module.q_proj.bias is not None:
        bias = torch.cat([one.bias for one in modules])
    if module.norm_whole:
        whole_norms = module.k_norm.weight.detach(), module.q_norm.weight.detach()
    elif config.qk_norm:
        key_scale = module.k_norm.weight.expand(key_heads, -1)
        query_scale = module.q_norm.weight.expand(heads, -1)
        norm = torch.cat((key_scale, query_scale))
    attention = PackedAttention(
        layer=module.layer_idx,
        heads=heads,
        key_heads=key_heads,
        head_dim=config.head_dim,
        norm=norm,
        norm_eps=config.inner_norm_eps,
        window=module.sliding_window,
        rotary=config.rope_setting(module.layer_idx) if module.uses_rope else None,
        rotate_first=config.qk_norm_after_rope,
        whole_norms=whole_norms,
        softcap=config.attn_logit_softcapping,
        sinks=None if module.sinks is None else module.sinks.detach(),
    )
    return Projection(weight, bias, len(weight), "none", attention)


def _pack_mlp(config: SlicedConfig, reader: WeightReader, module: SlicedMLP) -> Projection:
    activation = ACTIVATION_NAMES[config.hidden_act]
    if not config.gated_mlp:
        bias = None if module.up_proj.bias is None else module.up_proj.bias.detach()
        return Projection(reader.below([module.up_proj]), bias, module.up_proj.out_features, activation)
    weight = reader.below([module.gate_proj, module.up_proj], gated=True)
    bias = None if module.up_proj.bias is None else torch.cat((module.gate_proj.bias, module.up_proj.bias))
    return Projection(weight, bias, len(weight), f"{activation}_gated")


def _pack_head(
    model: SlicedForCausalLM, embedding: Tensor | PanelWeight, reader: WeightReader
) -> tuple[Tensor | None, Projection | None, Projection]:
    """The scale of the last norm, the projection to a tied head's width, and the head.

    The shift of the last norm passes through the head and becomes a bias of the logits.
    """
    norm, projection, head = model.model.norm, model.model.head_projection, model.lm_head
    tied = _first_address(head) == _first_address(model.model.embed_tokens)
    weight = embedding if tied else reader.table(head)
    bias = None if head.bias is None else head.bias.detach()
    scale = None
    if isinstance(norm, FinalNorm):
        scale = norm.weight.detach()
        if norm.bias is not None:
            dense = weight.dense(weight.dtype) if isinstance(weight, PanelWeight) else weight
            shift = torch.cat([rows.double() @ norm.bias.double() for rows in dense.split(16384)])
            bias = (shift if bias is None else shift + bias.double()).to(weight.dtype)
    if isinstance(projection, nn.Linear):
        inner_bias = None if projection.bias is None else projection.bias.detach()
        inner = Projection(projection.weight.detach(), inner_bias, projection.out_features, "none")
        return scale, inner, Projection(weight, bias, 0, "none")
    return scale, None, Projection(weight, bias, len(weight), "none")


def _first_address(module: nn.Module) -> int:
    """Where the first of a module's parameters lies: the same for tied ones."""
    return next(module.parameters()).data_ptr()
