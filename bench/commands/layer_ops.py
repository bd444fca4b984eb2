"""One transformer layer as a list of named operations, dense or sliced, and with 2:4 sparse weights.

An operation reads and writes named tensors of a state; in order, the operations compute the layer. So each can be timed
in place, with the inputs and cache contents that it has there, and the sum compared with the time of the whole layer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slicegpt.bench.models.architectures import random_dense
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.layers import apply_rotary, eager_attention
from slicegpt.modeling.network import SlicedDecoderLayer, SlicedParallelDecoderLayer
from slicegpt.modeling.random_weights import random_model

State = dict[str, Tensor]
Layer = SlicedDecoderLayer | SlicedParallelDecoderLayer


@dataclass(frozen=True)
class Operation:
    """One operation of a layer; `run` reads and writes the state."""

    name: str
    run: Callable[[State], None]


@dataclass
class LayerRun:
    """A layer that can be run operation by operation or as a whole.

    Attributes:
        variant: its name in tables.
        operations: in order; they read "stream" [batch, tokens, d] and write "output".
        whole: the same layer in one call; returns its output.
        state: the tensors before the first operation.
        reference: an independent computation of the output, where `whole` only runs the operations.
        library: of its 2:4 sparse products, "cuSPARSELt" or "CUTLASS"; None where dense.
    """

    variant: str
    operations: list[Operation]
    whole: Callable[[], Tensor]
    state: State
    reference: Callable[[], Tensor] | None = None
    library: str | None = None


# Fields of `SlicedConfig` that have one entry a layer.
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layer_neurons",
    "layer_key_value_heads",
    "layer_group_heads",
    "layer_rope_parameters",
    "no_rope_layers",
)


def one_layer(config: SlicedConfig) -> SlicedConfig:
    """The configuration with one layer, which has the widths and shortcuts of the first, and the smallest head."""
    return first_layers(config, 1)


def first_layers(config: SlicedConfig, count: int) -> SlicedConfig:
    """The configuration with the first `count` layers, their widths and shortcuts, and the smallest head."""
    blocks = count if config.parallel_blocks else 2 * count
    lists = {name: getattr(config, name) for name in PER_LAYER if getattr(config, name) is not None}
    return SlicedConfig(
        **{
            **config.to_dict(),
            "num_hidden_layers": count,
            **{name: values[:count] for name, values in lists.items()},
            "boundary_widths": config.boundary_widths[: blocks + 1],
            "shortcuts": config.shortcuts[:blocks],
            "vocab_size": 8,
            "tie_word_embeddings": False,
            "embed_projection": False,
            "head_projection": False,
            "final_norm_weight": False,
            "final_norm_bias": False,
            "lm_head_bias": False,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    )


@dataclass(frozen=True)
class LayerInputs:
    """A random residual stream [batch, tokens, d], the layer's attention mask, and rotary cosines and sines."""

    stream: Tensor
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


def layer_inputs(model: nn.Module, batch: int, seqlen: int) -> LayerInputs:
    """Inputs of the first layer of a model."""
    config, weight = model.config, next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (batch, seqlen, config.boundary_widths[0])
    stream = torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
    positions = torch.arange(seqlen, device=weight.device).expand(batch, seqlen)
    masks, rotary = model.model.block_inputs(stream, positions, None)
    return LayerInputs(stream, masks[config.layer_types[0]], rotary[0])


def attend(module: nn.Module, inputs: LayerInputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as the module calls it; query, key, value and result are [batch, tokens, columns]."""
    heads = (*query.shape[:2], -1, module.head_dim)
    query = module.q_norm(query.view(heads)).transpose(1, 2)
    key = module.k_norm(key.view(heads)).transpose(1, 2)
    value = value.view(heads).transpose(1, 2)
    if inputs.rotary is not None:
        query, key = apply_rotary(query, *inputs.rotary), apply_rotary(key, *inputs.rotary)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    output, _ = interface(
        module,
        query,
        key,
        value,
        inputs.mask,
        dropout=0.0,
        scaling=module.scaling,
        sliding_window=module.sliding_window,
    )
    return output.reshape(*output.shape[:2], -1)


class UnfusedLayer:
    """The module's own operations, one by one.

    Tensors that the module frees are removed from the state at the same point, so that the allocator reuses memory that
    is still in the cache, as it does in the module.
    """

    def __init__(self, layer: Layer, inputs: LayerInputs):
        self.layer, self.inputs = layer, inputs
        self.attention, self.mlp = layer.self_attn, layer.mlp

    def operations(self) -> list[Operation]:
        if isinstance(self.layer, SlicedParallelDecoderLayer):
            return [
                self.norm("norm", self.layer.input_norm),
                *self.attention_operations(),
                *self.mlp_operations(),
                Operation("shortcut", self.parallel_shortcut),
            ]
        return [
            self.norm("attention norm", self.layer.input_norm),
            *self.attention_operations(),
            self.shortcut("attention shortcut", self.layer.attention_shortcut, "out", "stream"),
            self.norm("MLP norm", self.layer.mlp_norm),
            *self.mlp_operations(),
            self.shortcut("MLP shortcut", self.layer.mlp_shortcut, "down", "output"),
        ]

    @staticmethod
    def norm(name: str, norm: nn.Module) -> Operation:
        def run(state: State) -> None:
            state["normed"] = norm(state["stream"])

        return Operation(name, run)

    @staticmethod
    def linear(name: str, linear: nn.Module, source: str) -> Operation:
        def run(state: State) -> None:
            state[name] = linear(state[source] if source == "normed" else state.pop(source))

        return Operation(name, run)

    @staticmethod
    def shortcut(name: str, shortcut: nn.Module, block: str, target: str) -> Operation:
        def run(state: State) -> None:
            del state["normed"]
            state[target] = shortcut(state["stream"]) + state.pop(block)

        return Operation(name, run)

    def parallel_shortcut(self, state: State) -> None:
        del state["normed"]
        state["output"] = self.layer.shortcut(state["stream"]) + state.pop("out") + state.pop("down")

    def attention_operations(self) -> list[Operation]:
        a = self.attention
        return [
            self.linear("q", a.q_proj, "normed"),
            self.linear("k", a.k_proj, "normed"),
            self.linear("v", a.v_proj, "normed"),
            Operation("attention", self.attend),
            self.linear("out", a.o_proj, "attended"),
        ]

    def attend(self, state: State) -> None:
        query, key, value = (state.pop(name) for name in "qkv")
        state["attended"] = attend(self.attention, self.inputs, query, key, value)

    def mlp_operations(self) -> list[Operation]:
        m, gated = self.mlp, self.mlp.gate_proj is not None

        def activate(state: State) -> None:
            up = state.pop("up")
            state["activated"] = m.act_fn(state.pop("gate")) * up if gated else m.act_fn(up)

        return [
            *([self.linear("gate", m.gate_proj, "normed")] if gated else []),
            self.linear("up", m.up_proj, "normed"),
            Operation("activation", activate),
            self.linear("down", m.down_proj, "activated"),
        ]


def unfused(variant: str, config: SlicedConfig, batch: int, seqlen: int, dtype, device) -> LayerRun:
    """A layer of the plain model with random weights."""
    model = random_model(one_layer(config), dtype, device)
    return _of_module(variant, model, batch, seqlen)


def _of_module(variant: str, model: nn.Module, batch: int, seqlen: int) -> LayerRun:
    inputs = layer_inputs(model, batch, seqlen)
    layer = model.model.layers[0]
    operations = UnfusedLayer(layer, inputs).operations()
    return LayerRun(variant, operations, module_run(layer, inputs), {"stream": inputs.stream})


def module_run(layer: Layer, inputs: LayerInputs) -> Callable[[], Tensor]:
    """One call of the module."""
    return lambda: layer(inputs.stream, attention_mask=inputs.mask, position_embeddings=inputs.rotary)


def reason_against_2_4(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why 2:4 sparse products are not available here; None where they are."""
    if device.type != "cuda":
        return "2:4 sparse products need an NVIDIA GPU of compute capability 8.0 or later; this is a CPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "2:4 sparse products need compute capability 8.0 or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return (
            f"2:4 sparse products need float16 or bfloat16 weights, not {str(dtype).removeprefix('torch.')}"
        )
    return None


@torch.no_grad()
def sparse_2_4(variant: str, config: SlicedConfig, batch: int, seqlen: int, dtype, device) -> LayerRun:
    """The dense layer with the two smaller of every four weights of a row deleted, on sparse tensor cores.

    Products are those of `torch.sparse.to_sparse_semi_structured`: by cuSPARSELt, or by CUTLASS where
    `SparseSemiStructuredTensor._FORCE_CUTLASS` is set; `LayerRun.library` says which.

    Raises:
        RuntimeError: cuSPARSELt is missing, or does not support a shape.
    """
    model = random_model(one_layer(config), dtype, device)
    libraries = set()
    for module in model.model.layers[0].modules():
        if isinstance(module, nn.Linear):
            pruned = prune_2_4(module.weight)
            sparse = torch.sparse.to_sparse_semi_structured(pruned)
            module.weight = nn.Parameter(sparse, requires_grad=False)
            libraries.add(sparse_library(type(sparse)))
    run = _of_module(variant, model, batch, seqlen)
    run.library = ", ".join(sorted(libraries))
    return run


def sparse_library(kind: type[Tensor]) -> str:
    """The library of a class of 2:4 sparse tensors; the class's name where it is unknown."""
    known = {
        torch.sparse.SparseSemiStructuredTensorCUSPARSELT: "cuSPARSELt",
        torch.sparse.SparseSemiStructuredTensorCUTLASS: "CUTLASS",
    }
    return known.get(kind, kind.__name__)


def prune_2_4(weight: Tensor) -> Tensor:
    """Zero the two smallest magnitudes of every four consecutive weights of a row."""
    groups = weight.unflatten(1, (-1, 4))
    smallest = groups.abs().topk(2, dim=2, largest=False).indices
    return groups.scatter(2, smallest, 0).flatten(1)


def huggingface_whole(config, batch: int, seqlen: int, dtype, device) -> Callable[[Callable], None]:
    """Hugging Face's own layer: a function that runs it once and calls its argument before and after the layer.

    Args:
        config: the Hugging Face configuration of the dense model.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = 1, 8
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = random_dense(config, dtype, device).base_model
    layers = next(
        m for n, m in model.named_modules() if n.endswith("layers") and isinstance(m, nn.ModuleList)
    )
    ids = torch.zeros(batch, seqlen, dtype=torch.long, device=device)

    def run(mark: Callable[[], None]) -> None:
        handles = [
            layers[0].register_forward_pre_hook(lambda *_: mark()),
            layers[0].register_forward_hook(lambda *_: mark()),
        ]
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    return run
