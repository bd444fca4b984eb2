"""The weights of a `SlicedForCausalLM` laid out for `norm_linear` and `rotate_add`: two GEMMs a block.

One input GEMM holds the rows of v, k, q and the factor Fᵀ of a compact shortcut, or of gate, up and the factor; one
output GEMM holds `[W_out | -F]`. The order v, k, q, z lets attention write its result over q, where it lies beside
z: the output GEMM reads `[attended | z]` without a copy. Parallel blocks have two input GEMMs, whose activations
differ. Weights of 8 and 4 bits stay what they are where there are kernels for them (`PanelWeight`), and are made dense
elsewhere; a shortcut's factor is the part of them that is not quantized.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slicegpt.errors import SliceGPTError
from slicegpt.modeling import CompactShortcut, SlicedConfig, SlicedForCausalLM
from slicegpt.modeling.layers import FinalNorm, SlicedAttention, SlicedMLP
from slicegpt.ops import quantized
from slicegpt.ops.contracts import GATED
from slicegpt.ops.panels import PanelWeight
from slicegpt.ops.rotate_add import reads_factor
from slicegpt.runtime.linear_weights import WeightReader, with_factor, with_negative_factor
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


@dataclass(frozen=True)
class PackedAttention:
    """Attention of one layer, apart from its projections: heads, q/k norm and window.

    Attributes:
        layer: index into the cache.
        norm: scales [key heads + query heads, head_dim] of the norm of keys and queries, or None.
        window: number of tokens that a token attends to, itself included, or None.
        rotary: rotary positions turn queries and keys.
        rotate_first: the norm comes behind the rotation.
    """

    layer: int
    heads: int
    key_heads: int
    head_dim: int
    norm: Tensor | None
    norm_eps: float
    window: int | None
    rotary: bool
    rotate_first: bool


@dataclass(frozen=True)
class Projection:
    """One `norm_linear`: weight [N, d], bias [n_scaled] or None; `attention` follows it, or None."""

    weight: Tensor | PanelWeight
    bias: Tensor | None
    n_scaled: int
    activation: str
    attention: PackedAttention | None = None


@dataclass(frozen=True)
class PackedBlock:
    """One block, from its boundary to the next: input GEMMs, and one `rotate_add` of their concatenated results.

    Attributes:
        factor: Fᵀ [rank, d] of a compact shortcut, a view of the last rows of the last input's weight; `output` holds
            the same numbers in its last columns. None for another shortcut, for rank 0, and beside a `PanelWeight`.
    """

    inputs: tuple[Projection, ...]
    width: int
    eps: float
    output: Tensor | PanelWeight
    output_bias: Tensor | None
    shortcut: Tensor | None
    factor: Tensor | None = None


@dataclass(frozen=True)
class PackedNetwork:
    """All weights of a model.

    Attributes:
        embed_projection, positions: None where the model has none; positions [rows, d] begin at row
            `config.position_offset`.
        rotary: `[cos | signed sin]` of every position, [positions, 2, rotary_dim] in the model's dtype, or None.
        final_scale: [d], the scale that the last norm of a tied model keeps, or None.
        head_projection: from a sliced last boundary to the width of a tied head, or None.
        head: reads the last norm, or the output of `head_projection` without a norm (`n_scaled` is then 0).
        made_dense: the model has weights of fewer bits, for which there are no kernels here.
    """

    config: SlicedConfig
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor | PanelWeight
    embed_projection: Tensor | None
    positions: Tensor | None
    rotary: Tensor | None
    blocks: tuple[PackedBlock, ...]
    final_scale: Tensor | None
    final_eps: float
    head_projection: Projection | None
    head: Projection
    made_dense: bool = False

    def stored_bytes(self) -> int:
        """Bytes of all weights, with both copies of compact factors; a tied head is counted once."""
        tied = self.head.weight.data_ptr() == self.embedding.data_ptr()
        return _bytes([*self._weights(), None if tied else self.embedding, self.positions])

    def bytes_per_token(self, rows: int = 1) -> int:
        """Bytes of weights that generating a token for each of `rows` sequences moves from memory.

        One row of the embedding is counted, and both copies of a compact factor, or one where `rotate_add` reads the
        other from L2.
        """
        found = [
            block.output[:, -len(block.factor) :]
            for block in self.blocks
            if block.factor is not None and reads_factor(block.output, block.factor, rows)
        ]
        looked_up = _bytes([self.embedding]) // len(self.embedding)
        return _bytes([*self._weights(), self.positions_of_a_token()]) + looked_up - _bytes(found)

    def positions_of_a_token(self) -> Tensor | None:
        """One row of the learned positions."""
        return None if self.positions is None else self.positions[:1]

    def weights_text(self) -> str:
        """The dtype, and what the weights of the blocks are where they are not of it: bfloat16, 4-bit weights."""
        name = str(self.dtype).removeprefix("torch.")
        if self.made_dense:
            return f"{name}, quantized weights made dense (no kernels for them here)"
        bits = self.bits()
        return f"{name}, {' and '.join(map(str, bits))}-bit weights" if bits else name

    def bits(self) -> list[int]:
        """Of the quantized weights of the blocks, most first; none where there are none."""
        weights = [one.weight for block in self.blocks for one in block.inputs] + [
            b.output for b in self.blocks
        ]
        return sorted({one.bits for one in weights if isinstance(one, PanelWeight)}, reverse=True)

    def _weights(self) -> list[Tensor | PanelWeight | None]:
        """All weights but the embedding tables."""
        tensors = [self.embed_projection, self.final_scale, self.head.weight, self.head.bias]
        if self.head_projection is not None:
            tensors += [self.head_projection.weight, self.head_projection.bias]
        for block in self.blocks:
            tensors += [block.output, block.output_bias, block.shortcut]
            for projection in block.inputs:
                tensors += [projection.weight, projection.bias]
                tensors.append(projection.attention and projection.attention.norm)
        return tensors


def _bytes(tensors: list[Tensor | PanelWeight | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


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
    dtype = embedding.dtype
    rotary = None
    if trunk.rotary_emb is not None:
        if trunk.rotary_emb.rope_type in UNSUPPORTED_ROPE:
            raise SliceGPTError(
                f"rope type {trunk.rotary_emb.rope_type!r} is not supported; use the plain model", "model"
            )
        empty = torch.empty(0, dtype=dtype, device=like.device)
        rotary = rotary_table(trunk.rotary_emb, empty, max_positions or position_limit(config)[0])
    made_dense = not reader.panels and any(hasattr(one, "weight_packed") for one in model.modules())
    blocks: list[PackedBlock] = []
    for layer in trunk.layers:
        packed = pack_layer(config, layer, reader)
        blocks += packed if memory is None else [_copied(block, memory) for block in packed]
        if release:
            layer.to("meta")
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
        rotary=rotary,
        blocks=tuple(blocks),
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
    shortcut = None if block.shortcut is None else memory.copy(block.shortcut)
    return replace(block, inputs=inputs, output=memory.copy(block.output), shortcut=shortcut, factor=factor)


@torch.no_grad()
def pack_layer(config: SlicedConfig, layer: nn.Module, reader: WeightReader) -> tuple[PackedBlock, ...]:
    """The one or two blocks of a decoder layer.

    Errors: `SliceGPTError` for an activation that the fused operators do not have.
    """
    if config.hidden_act not in ACTIVATION_NAMES or (
        config.gated_mlp and f"{ACTIVATION_NAMES[config.hidden_act]}_gated" not in GATED
    ):
        gated = "gated " if config.gated_mlp else ""
        raise SliceGPTError(
            f"{gated}activation {config.hidden_act!r} is not supported; use the plain model", "model"
        )
    if config.parallel_blocks:
        parts = [(layer.input_norm, (layer.self_attn, layer.mlp), layer.shortcut)]
    else:
        parts = [
            (layer.input_norm, (layer.self_attn,), layer.attention_shortcut),
            (layer.mlp_norm, (layer.mlp,), layer.mlp_shortcut),
        ]
    return tuple(_pack_block(config, reader, *part) for part in parts)


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
    norm: nn.Module,
    modules: tuple[nn.Module, ...],
    shortcut: nn.Module,
) -> PackedBlock:
    inputs, writers, factor = [], [], None
    for module in modules:
        if isinstance(module, SlicedAttention):
            inputs.append(_pack_attention(config, reader, module))
            writers.append(module.o_proj)
        else:
            inputs.append(_pack_mlp(config, reader, module))
            writers.append(module.down_proj)
    output = reader.beside(writers)
    biases = [writer.bias for writer in writers if writer.bias is not None]
    if isinstance(shortcut, CompactShortcut) and len(shortcut.factor):
        # z = h F are the last columns of the last input GEMM; -Fᵀ brings them back to h's columns.
        last = inputs[-1]
        inputs[-1] = replace(last, weight=with_factor(last.weight, shortcut.factor))
        if not isinstance(last.weight, PanelWeight) and not isinstance(output, PanelWeight):
            factor = inputs[-1].weight[len(last.weight) :]
        output = with_negative_factor(output, shortcut.factor, shortcut.padding)
    return PackedBlock(
        inputs=tuple(inputs),
        width=norm.width,
        eps=norm.eps,
        output=output,
        output_bias=sum(biases) if biases else None,
        shortcut=shortcut.weight.detach() if isinstance(shortcut, nn.Linear) else None,
        factor=factor,
    )


def _pack_attention(config: SlicedConfig, reader: WeightReader, module: SlicedAttention) -> Projection:
    modules = (module.v_proj, module.k_proj, module.q_proj)
    weight = reader.below(modules)
    bias = norm = None
    if module.q_proj.bias is not None:
        bias = torch.cat([one.bias for one in modules])
    if config.qk_norm:
        key_scale = module.k_norm.weight.expand(config.num_key_value_heads, -1)
        query_scale = module.q_norm.weight.expand(config.num_attention_heads, -1)
        norm = torch.cat((key_scale, query_scale))
    attention = PackedAttention(
        layer=module.layer_idx,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm=norm,
        norm_eps=config.rms_norm_eps,
        window=module.sliding_window,
        rotary=module.uses_rope,
        rotate_first=config.qk_norm_after_rope,
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
