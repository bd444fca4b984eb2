"""The sliced network inside vLLM: its Transformers back end, with pipeline stages that know their widths.

vLLM builds `slicegpt.modeling`'s own network and replaces its parts: QKV and gate/up become one product each, the
norms its RMSNorm, the linear layers its sharded ones, attention its paged one. What it cannot know is that the
residual stream changes its width on the way, and that layers may have different numbers of heads, or no attention;
this file tells it.
"""

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import Attention
from vllm.model_executor.models.utils import PPMissingLayer, make_empty_intermediate_tensors_factory

from slicegpt.modeling import SlicedConfig
from slicegpt.serving.plugin import check_servable, heads_of_rank


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
        if group.is_last_rank:
            self.logits_processor.soft_cap = config.final_logit_softcapping
        self._fix_longrope(vllm_config.model_config.max_model_len)
        first_layer, _ = get_pp_indices(config.num_hidden_layers, group.rank_in_group, group.world_size)
        width = config.boundary_widths[entry_boundary(config, first_layer)]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], width
        )

    def create_attention_instances(self) -> dict[int, Attention]:
        """vLLM's attention of each of this stage's layers that has any, with the heads of this rank."""
        config, group = self.text_config, self.pp_group
        if config.keeps_all_heads:
            return super().create_attention_instances()
        instances = {}
        for layer in range(*get_pp_indices(config.num_hidden_layers, group.rank_in_group, group.world_size)):
            if not config.key_value_heads[layer]:
                continue
            heads, key_heads = heads_of_rank(config, layer, self.tp_group.world_size)
            sliding = config.attention_types[layer] == "sliding_attention"
            instances[layer] = Attention(
                num_heads=heads,
                head_size=config.head_dim,
                scale=config.head_dim**-0.5,
                num_kv_heads=key_heads,
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                per_layer_sliding_window=config.sliding_window if sliding else None,
                prefix=f"{layer}.attn",
            )
        return instances

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
