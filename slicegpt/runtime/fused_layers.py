"""The fused operators inside the plain model: its layers call `norm_linear` and `rotate_add` on packed weights.

For use with transformers' `generate()`, its caches and `torch.compile(fullgraph=True)`; `Runtime` is faster. Embedding,
final norm, head and the attention function stay what they are.
"""

import copy

import torch
from torch import Tensor, nn

from slicegpt import ops
from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.modeling.layers import Constant, SlicedAttention
from slicegpt.runtime.executor import add_normed, row_scale
from slicegpt.runtime.packed import PackedBlock
from slicegpt.runtime.packing import check_one_device, pack_layer, weight_reader


@torch.no_grad()
def fuse_layers(model: SlicedForCausalLM, release: bool = False) -> SlicedForCausalLM:
    """Make the layers of `model` call the fused operators, in place; returns `model`.

    For inference under `torch.no_grad()`: the operators have no gradients. The packed weights are a copy on the model's
    device, so later changes to the parameters have no effect until `fuse_layers` is called again. The modules and their
    parameters stay, so `save_pretrained` writes what it did before. Attention probabilities cannot be recorded
    (`output_attentions`). `unfuse_layers` undoes it.

    Args:
        model: in float16, bfloat16, float32 or float64.
        release: free each layer's weights in `model` once they are packed, so that they are never held twice; the model
            can then be neither unfused nor saved.

    Raises:
        SliceGPTError: not a `SlicedForCausalLM` (see `to_canonical`), an activation without a fused form, experts, or
            attention sinks.
    """
    if not isinstance(model, SlicedForCausalLM):
        raise SliceGPTError(
            f"must be a SlicedForCausalLM, got {type(model).__name__}; see to_canonical", "model"
        )
    check_one_device("fuse_layers", model)
    if model.config.num_experts or model.config.attention_sinks:
        what = "a mixture of experts" if model.config.num_experts else "attention sinks"
        raise SliceGPTError(
            f"{what} is not supported by fuse_layers; use the plain model, or Runtime", "model"
        )
    reader = weight_reader(model)
    for index, layer in enumerate(model.model.layers):
        blocks = pack_layer(model.config, index, layer, reader)
        layer.forward = _FusedForward(layer.self_attn, blocks)
        if release:
            layer.to("meta")
    return model


def unfuse_layers(model: SlicedForCausalLM) -> SlicedForCausalLM:
    """Undo `fuse_layers`, in place; returns `model`."""
    for layer in model.model.layers:
        layer.__dict__.pop("forward", None)
    return model


class _Columns(nn.Module):
    """Takes the place of a projection whose result has been computed: columns of the given rows."""

    def __init__(self, first: int, last: int):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, rows: Tensor) -> Tensor:
        columns = rows[..., self.first : self.last]
        # Attention kernels on a GPU load 16 bytes at a time.
        return columns.contiguous() if rows.is_cuda and rows.shape[-1] % 8 else columns


def _attention_of_rows(module: SlicedAttention) -> SlicedAttention:
    """The same attention without its projections: [batch, tokens, v | k | q | z] to [batch, tokens, attended]."""
    clone = copy.copy(module)
    # A shallow copy would share the dictionary of modules; the norms are copied to survive a release of the weights.
    clone._modules = {name: copy.deepcopy(module._modules[name]) for name in ("q_norm", "k_norm")}
    keys, queries = module.k_proj.out_features, module.q_proj.out_features
    clone.v_proj, clone.k_proj = _Columns(0, keys), _Columns(keys, 2 * keys)
    clone.q_proj, clone.o_proj = _Columns(2 * keys, 2 * keys + queries), nn.Identity()
    return clone


class _FusedForward:
    """The forward pass of a layer: `forward(hidden_states, **kwargs)`, [batch, tokens, d] to [batch, tokens, d']."""

    def __init__(self, attention: SlicedAttention | Constant, blocks: tuple[PackedBlock, ...]):
        self.blocks = blocks
        if isinstance(attention, Constant):
            return
        self.attention = _attention_of_rows(attention)
        self.end = 2 * attention.k_proj.out_features + attention.q_proj.out_features

    def __call__(self, hidden_states: Tensor, **kwargs) -> Tensor:
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise SliceGPTError(
                "fused layers: must run under torch.no_grad(), got a stream that requires grad"
            )
        shape, stream, sums = hidden_states.shape[:-1], hidden_states.flatten(0, -2), None
        for block in self.blocks:
            stream, sums = self._block(block, stream, sums, shape, kwargs)
        return stream.unflatten(0, shape)

    def _block(
        self, block: PackedBlock, stream: Tensor, sums: Tensor | None, shape: torch.Size, kwargs: dict
    ) -> tuple[Tensor, Tensor | None]:
        if not block.inputs:
            return block.carried(stream), None
        pieces = []
        sums, eps = row_scale(block, stream, sums)
        for one in block.inputs:
            rows = ops.norm_linear(
                stream, one.weight, one.bias, sums, one.n_scaled, one.activation, block.width, eps
            )
            if one.attention is None:
                pieces.append(rows)
                continue
            attended, _ = self.attention(rows.unflatten(0, shape), **kwargs)
            pieces.append(attended.flatten(0, -2))
            if rows.shape[1] > self.end:
                pieces.append(rows[:, self.end :])
        a = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        if block.output_norm is not None:
            return add_normed(block, a, stream, ops.rotate_add)
        return ops.rotate_add(a, block.output, stream, block.shortcut, block.output_bias, block.factor)
