"""A model without shortcuts as the graph that llama.cpp runs.

The canonical network with one basis and no shortcuts is the graph that llama.cpp calls `llama`, whatever the family of
the model: RMS norms, rotary positions over whole heads, a SiLU-gated MLP, biases where there are any. Its variants that
are taken here: `qwen2` for biases on queries, keys and values alone; `qwen3` for norms on queries and keys; `deci`
where layers have different numbers of neurons. What else the network may have, llama.cpp's graph has no place for: the
export refuses it by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from slicegpt.conversion.plan import constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import FAMILIES, Checkpoint, DenseSource, Linear, canonical_fields, family_of
from slicegpt.modeling import SlicedConfig


@dataclass(frozen=True)
class Layer:
    """A layer of the canonical network; norms are scales [d], None for 1."""

    attention_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    linears: dict[str, Linear]
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass(frozen=True)
class Network:
    """The canonical network without shortcuts, a layer at a time.

    Attributes:
        config: its facts; one width.
        eps: of its norms, over that width.
        architecture: llama.cpp's name of the graph.
    """

    config: SlicedConfig
    eps: float
    architecture: str
    source: DenseSource

    @property
    def width(self) -> int:
        return self.config.boundary_widths[0]

    @property
    def is_sliced(self) -> bool:
        """Its tensors are those of `SlicedForCausalLM`, and no other family's."""
        return isinstance(self.source.config, SlicedConfig)

    @property
    def dense(self) -> Checkpoint:
        """Its tensors where they are another family's."""
        source = self.source
        return Checkpoint(
            family_of(source.config), source.tensors, source.config, self.config.tie_word_embeddings
        )

    def embedding(self) -> torch.Tensor:
        if self.is_sliced:
            return self.source.tensors["model.embed_tokens.weight"]
        return self.dense.embedding

    def head(self) -> torch.Tensor | None:
        """Its weight; None where it is the embedding table."""
        if self.config.tie_word_embeddings:
            return None
        if self.is_sliced:
            return self.source.tensors["lm_head.weight"]
        return self.dense.head.weight

    def final_norm(self) -> torch.Tensor | None:
        if not self.is_sliced:
            return self.dense.final_norm.weight
        name = "model.norm.weight"
        return self.source.tensors.get(name)

    def layers(self) -> Iterator[Layer]:
        for index in range(self.config.num_hidden_layers):
            yield self._sliced_layer(index) if self.is_sliced else self._dense_layer(index)

    def _dense_layer(self, index: int) -> Layer:
        layer = self.dense.layer(index)
        linears = {part: getattr(layer, part) for part in ("q", "k", "v", "o", "gate", "up", "down")}
        norms = layer.attention_norm.weight, layer.mlp_norm.weight
        return Layer(*norms, linears, layer.q_norm, layer.k_norm)

    def _sliced_layer(self, index: int) -> Layer:
        tensors, root = self.source.tensors, f"model.layers.{index}"

        def linear(name: str) -> Linear:
            bias = f"{root}.{name}.bias"
            return Linear(tensors[f"{root}.{name}.weight"], tensors.get(bias))

        attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
        linears = {part: linear(f"self_attn.{part}_proj") for part in attention}
        linears |= {part: linear(f"mlp.{part}_proj") for part in mlp}
        own = [f"{root}.self_attn.{part}_norm.weight" for part in ("q", "k")]
        norms = [tensors.get(name) for name in own]
        return Layer(None, None, linears, *norms)


def network_of(source: DenseSource) -> Network:
    """A model as llama.cpp's graph.

    Raises:
        SliceGPTError: it has a part that this graph has no place for.
    """
    if isinstance(source.config, SlicedConfig):
        config = source.config
        eps = config.boundary_eps(0)
    else:
        fields = canonical_fields(source)
        config = plan(fields, constant_widths(fields, fields["dense_hidden_size"]))
        eps = config.rms_norm_eps
    return Network(config, eps, architecture_of(config, source.config.model_type), source)


def architecture_of(config: SlicedConfig, name: str) -> str:
    """llama.cpp's name of the graph of a canonical network.

    Args:
        name: of the model's family, for messages.
    """

    def refuse(what: str, advice: str = "") -> None:
        raise SliceGPTError(f"{name}: llama.cpp's graph has no {what}{advice}", "gguf")

    if config.num_experts:
        refuse("mixtures of experts that this export writes")
    shortcuts = sorted(set(config.shortcuts) - {"identity"})
    if shortcuts or len(set(config.boundary_widths)) > 1:
        refuse(f"shortcuts, and this model has {' and '.join(shortcuts)} ones", "; slice with --form stock")
    if min(*config.key_value_heads, *config.neurons) < 1:
        refuse("place for the constants that layers without attention or MLP leave")
    if config.kv_lora_rank is not None:
        refuse("latent attention that this export writes")
    if config.parallel_blocks:
        refuse("place for attention and MLP in parallel")
    if config.embed_projection or config.final_norm_bias or config.lm_head_bias:
        refuse("place for what LayerNorms and biases of the head become")
    if FAMILIES[config.source_model_type].mean_subtraction:
        refuse("LayerNorms that this export writes")
    if config.position_embedding != "rotary" or config.no_rope_layers not in (
        None,
        [1] * config.num_hidden_layers,
    ):
        refuse("layers without rotary positions")
    if config.query_scaling is not None:
        refuse("queries that grow with their position")
    if config.attention_sinks:
        refuse("attention sinks that this export writes")
    if config.post_norm or config.qk_norm_whole or config.layer_rope_parameters is not None:
        refuse(
            "norms behind blocks, norms over all heads or rotary settings of a layer's own that this export writes"
        )
    if config.qk_norm_after_rope:
        refuse("norms of queries and keys behind their rotation")
    if not config.gated_mlp or config.hidden_act not in ("silu", "swish"):
        refuse(f"MLP other than a SiLU-gated one, this one's is {config.hidden_act}")
    windowed = config.sliding_window is not None and "sliding_attention" in config.layer_types
    if windowed and config.sliding_window < config.max_position_embeddings:
        refuse(f"sliding window, this model's is {config.sliding_window} tokens")
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1:
        refuse("heads of which a part is rotated")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        refuse(f"rotary positions of type {rope['rope_type']} that this export writes")
    counts = config.neurons, config.key_value_heads, config.attention_heads
    uneven = any(len(set(count)) > 1 for count in counts)
    if config.qk_norm:
        if uneven:
            refuse("norms of queries and keys beside layers that differ", "; slice with --form stock")
        if config.attention_output_bias or config.mlp_bias or config.mlp_output_bias:
            refuse("biases beside norms of queries and keys")
        if config.boundary_widths[0] != config.dense_hidden_size:
            refuse("epsilon of its own for the norms of queries and keys", "; slice with --form stock")
        return "qwen3"
    if uneven:
        return "deci"
    biased = config.attention_bias and not (
        config.attention_output_bias or config.mlp_bias or config.mlp_output_bias
    )
    square = config.attention_heads[0] * config.head_dim == config.boundary_widths[0]
    return "qwen2" if biased and square else "llama"
