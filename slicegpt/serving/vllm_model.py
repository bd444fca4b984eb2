"""The sliced network inside vLLM: its Transformers back end, with pipeline stages that know their widths.

vLLM builds `slicegpt.modeling`'s own network and replaces its parts: QKV and gate/up become one product each, the
norms its RMSNorm, the linear layers its sharded ones, attention its paged one. What it cannot know is that the
residual stream changes its width on the way, and that layers may have different numbers of heads, or no attention;
this file tells it.
"""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR, Attention
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    maybe_prefix,
)
from vllm.model_executor.utils import set_weight_attrs

from slicegpt.modeling import SlicedConfig
from slicegpt.serving.plugin import check_servable, heads_of_rank
from slicegpt.serving.vllm_experts import use_operator


def entry_boundary(config: SlicedConfig, layer: int) -> int:
    """The boundary before layer `layer`; `layer = num_hidden_layers` gives the last one."""
    return layer if config.parallel_blocks else 2 * layer


def pass_stream(inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """What embeds on a later pipeline stage: it receives the stream itself, projected and positioned already."""
    return inputs_embeds


class SlicedForVLLM(TransformersForCausalLM):
    """`SlicedForCausalLM` on vLLM's layers, with tensor and pipeline parallelism."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_servable(vllm_config.model_config.hf_text_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, group = self.text_config, self.pp_group
        if config.qk_norm_whole and self.tp_group.world_size > 1:
            raise ValueError(
                f"tensor parallel size must be 1, got {self.tp_group.world_size}: {config.source_model_type}"
                " normalises queries and keys over all heads, and each rank has some of them"
            )
        self._check_attention()
        use_operator(self.model, captured=not vllm_config.model_config.enforce_eager)
        self._fix_longrope(vllm_config.model_config.max_model_len)
        first_layer, _ = get_pp_indices(config.num_hidden_layers, group.rank_in_group, group.world_size)
        width = config.boundary_widths[entry_boundary(config, first_layer)]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], width
        )

    def _create_attention_instances(self, prefix: str = "") -> None:
        """vLLM's attention of each of this stage's layers that has any, with the heads of this rank."""
        config = self.text_config
        for layer in self._attending_layers():
            if layer not in self.attention_fusers:
                raise ValueError(
                    f"layer {layer}: vLLM does not find its attention in the source of {__package__}"
                )
            name, _ = self.attention_fusers[layer]
            module = self.get_submodule(name)
            heads, key_heads = heads_of_rank(config, layer, self.tp_group.world_size)
            sliding = config.attention_types[layer] == "sliding_attention"
            sinks = {} if module.sinks is None else {"sinks": self._shard_sinks(module, heads)}
            attention = Attention(
                num_heads=heads,
                head_size=config.head_dim,
                scale=module.scaling,
                num_kv_heads=key_heads,
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                logits_soft_cap=config.attn_logit_softcapping,
                per_layer_sliding_window=config.sliding_window if sliding else None,
                prefix=maybe_prefix(prefix, f"{name}.{VLLM_ATTN_ATTR}"),
                **sinks,
            )
            setattr(module, VLLM_ATTN_ATTR, attention)

    def _shard_sinks(self, module: nn.Module, heads: int) -> nn.Parameter:
        """A layer's sinks become those of this rank's heads, which are loaded so. (vLLM itself finds sinks that a layer
        always hands on; transformers 5.18 and older take none where there are none.)"""
        sinks = torch.empty(heads, dtype=self.model_config.dtype, device=self.device_config.device)
        module.sinks = nn.Parameter(sinks, requires_grad=False)
        set_weight_attrs(module.sinks, {"weight_loader": sharded_weight_loader(0)})
        return module.sinks

    def _attending_layers(self) -> list[int]:
        """The layers of this stage that have attention."""
        config, group = self.text_config, self.pp_group
        own = get_pp_indices(config.num_hidden_layers, group.rank_in_group, group.world_size)
        return [layer for layer in range(*own) if config.key_value_heads[layer]]

    def _check_attention(self) -> None:
        """The method above is not of vLLM's public ones: a release that does not call it gives all layers one number of
        heads."""
        for layer in self._attending_layers():
            attention = getattr(self.model.layers[layer].self_attn, VLLM_ATTN_ATTR, None)
            heads, _ = heads_of_rank(self.text_config, layer, self.tp_group.world_size)
            if attention is None or attention.num_heads != heads:
                raise ValueError(
                    f"layer {layer} needs {heads} query heads, which this release of vLLM does not give it"
                )

    def _fix_longrope(self, length: int) -> None:
        """LongRoPE's frequencies by the longest sequence that is served: a batch mixes sequences of all lengths."""
        if self.text_config.longrope_length is None:
            return
        rotary = self.model.rotary_emb
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
            self.text_config, rotary.inv_freq.device, seq_len=length
        )
        rotary.inv_freq.copy_(frequencies)
        rotary.rope_type = "default"  # which no forward pass changes

    def pipeline_parallel(self) -> None:
        """Besides what the plan lists: projections and learned positions belong to the first and last stage only."""
        super().pipeline_parallel()
        if not self.pp_group.is_first_rank:
            self.model.embed_projection = PPMissingLayer()
            if self.model.embed_positions is not None:
                self.model.embed_positions = PPMissingLayer()
            self.model.embed = pass_stream
        if not self.pp_group.is_last_rank:
            self.model.head_projection = PPMissingLayer()
