"""`SlicedConfig`: the canonical network of `slicegpt.modeling.network`, described by its widths and few facts."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import check_architecture

# How tensor parallelism shares out attention with norms over all heads: columns, put together again.
_WHOLE_HEADS_PLAN = {
    "q_proj": "colwise_gather_output",
    "k_proj": "colwise_gather_output",
    "v_proj": "colwise_gather_output",
    "q_norm": "replicated",
    "k_norm": "replicated",
    "o_proj": "rowwise_split_input",
}


def factor_rank(dense_width: int, width: int, next_width: int) -> int:
    """Columns of the factor F of a compact shortcut `S = [I - F Fᵀ, 0]` from `width` to `next_width >= width`.

    Two subspaces of R^D of dimensions d <= d' share at least d + d' - D dimensions, so at most D - d' of the
    d principal angles between them differ from zero.
    """
    return min(width, dense_width - next_width)


@strict
class SlicedConfig(PreTrainedConfig):
    r"""Configuration of a sliced (or rotated, or dense) language model in canonical form.

    Boundary `b = 0..B` lies before block `b`; `B = 2 * num_hidden_layers` (attention and MLP are blocks of their
    own), or `num_hidden_layers` where `parallel_blocks` (Phi-2). At boundary `b` the residual stream has
    `boundary_widths[b]` columns, and block `b` adds its output to `h_b S_b`, where `shortcuts[b]` tells how the
    shortcut `S_b` is stored:

    - `"identity"`: `S_b = I` (equal widths);
    - `"compact"`: `S_b = [I - F Fᵀ, 0]`, `F` of `boundary_widths[b]` rows and `factor_rank(...)` columns;
    - `"dense"`: any matrix.

    Args:
        dense_hidden_size: D, the width of the model before slicing.
        boundary_widths: `B + 1` widths; all `dense_hidden_size` where not given.
        shortcuts: `B` kinds; all `"identity"` where not given.
        hidden_size: the width the head reads, and not the embedding's. It is derived: the last boundary's width, or D
            where `head_projection`. Rows of the embedding table (`inputs_embeds`) have `boundary_widths[0]` columns,
            or D where `embed_projection`: `model.get_input_embeddings().embedding_dim` tells.
        embed_projection: the embedding table keeps D columns (it is shared with the head) and a projection
            of shape D x `boundary_widths[0]` brings it onto the first boundary.
        head_projection: a projection of shape `boundary_widths[-1]` x D stands before the head, which keeps D columns.
            Where not given: if the head is tied and the last boundary sliced, for such a head is the embedding
            table. It is stored, so that embedding and head can be untied later and the model keeps its shape.
        final_norm_weight, final_norm_bias: the last norm keeps its scale (and shift), because a tied head
            cannot absorb them.
        parallel_blocks: attention and MLP read the same normalised stream and are added together.
        position_embedding: `"rotary"`, `"learned"` or `"none"`; learned positions start at row `position_offset`.
        no_rope_layers: of each layer, 1 where rotary positions turn its queries and keys and 0 where they do not, as in
            transformers' SmolLM3; where not given, all are turned.
        rope_parameters: as in transformers. With `llama_4_scaling_beta` queries grow with their position (Ministral 3);
            see `query_scaling`.
        layer_rope_parameters: those of each layer, where they differ (Gemma 3); of a layer without rotary positions
            they mean nothing. `rope_parameters` are then derived: those of the first layer.
        intermediate_size, dense_intermediate_size: MLP neurons of a layer, the most of any, and how many they were
            before slicing (the same where not given).
        layer_neurons: those of each layer, where they differ; see `neurons`. 0: the layer has no MLP.
        num_attention_heads, num_key_value_heads: query heads of a layer before slicing, and its key/value heads; each
            of these serves a group of query heads.
        layer_key_value_heads: key/value heads that each layer keeps, with their query heads, where some are deleted;
            see `key_value_heads`. 0: the layer has no attention, neither a norm before it nor a place in the cache. One
            layer at least has some.
        layer_group_heads: query heads that each key/value head of a layer keeps, one number a layer, where some are
            deleted; see `group_heads`. Groups of a layer are of one size, as attention kernels take them.
        layer_types: kind of attention of each layer, "full_attention" or "sliding_attention". transformers' caches read
            it layer by layer: where layers have no attention, the kinds of those that have come first, in order, and
            "full_attention" stands for the others. See `attention_types`.
        dense_layer_types: kind of attention of each layer before slicing, where some have none now.
        gated_mlp: `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        attention_bias, attention_output_bias, mlp_bias, mlp_output_bias, lm_head_bias: which linear layers
            carry a bias (folding a LayerNorm's shift creates some).
        num_experts: experts of a layer whose MLP is a mixture of them, 0 where no layer's is; `num_experts_per_tok`
            of them write for a token. Their input layers have biases where `expert_bias`, their output layers where
            `expert_output_bias`.
        mlp_layer_types: of each layer "dense" or "sparse" (a mixture of experts), as in transformers; where not given,
            all are sparse if there are experts.
        moe_intermediate_size, dense_moe_intermediate_size: neurons of an expert, the most of any layer, and before
            slicing. `intermediate_size` is that of the dense layers, or the same number where there is none.
        shared_expert_intermediate_size: neurons of the expert that writes for every token, 0 where there is none; its
            output is multiplied by a sigmoid of its own where `shared_expert_gate` (Qwen2-MoE).
        scoring_func: what makes the router's logits weights: "softmax", "sigmoid" or "sparsemixer" (Phi-3.5-MoE, with
            `router_jitter_noise` as its threshold). The chosen ones are divided by their sum where `norm_topk_prob`,
            and multiplied by `routed_scaling_factor`. router_in_float32: its logits are computed in float32 whatever
            the model's dtype; where not given, those of sigmoids are.
        router_bias: the router's logits have a bias. score_correction_bias: the choice of experts, and not their
            weights, sees the scores with a bias added (DeepSeek, GLM-4.5). n_group, topk_group: experts are chosen from
            the best `topk_group` of `n_group` groups: by the sum of the two best scores of each where they are
            sigmoids, else by the best one (DeepSeek V2).
        swiglu_alpha, swiglu_limit: experts compute `(up + 1) gate sigmoid(alpha gate)` of clamped values (gpt-oss).
        kv_lora_rank: keys and values are expanded from a latent of so many entries behind an RMSNorm of its own
            (multi-head latent attention, DeepSeek); None: they are projections of the stream. Then `head_dim` is the
            part of a query, and of the one key that all heads share, that is rotated; beside it a head has
            `qk_nope_head_dim` entries without positions, and its values `v_head_dim`. q_lora_rank: queries have a
            latent of their own; None: they are projections of the stream. A layer has all of its heads or none.
        attention_sinks: every head has a score that belongs to no token, and takes its share of the softmax (gpt-oss).
        qk_norm: queries and keys pass an RMSNorm over the head dimension (Qwen3).
        qk_norm_after_rope: they do so behind their rotation, and not before it (Hunyuan).
        qk_norm_whole: that norm is over all heads together (OLMo 2), with a scale for each of their columns.
        attn_logit_softcapping: scores become `c tanh(score / c)` before the softmax (Gemma 2).
        final_logit_softcapping: the same of the logits.
        pre_norm: blocks read the stream through its norm; False: they read the stream itself (OLMo 2).
        post_norm: what a block writes passes an RMSNorm over the D columns, with a scale that is kept (Gemma 2). Its
            divisor needs all of them: all boundaries are D wide, and no basis but the model's own will do.
        rms_norm_eps: epsilon of the norms of the original model. The norm divides by D, not by the sliced
            width; see `boundary_eps`.
        inner_norm_eps: epsilon of the norms that are not on the stream, of queries, keys and what blocks write;
            `rms_norm_eps` where not given.
        source_model_type, source_parameters: the family the weights came from, and how many elements the
            model stored before slicing.
    """

    model_type = "slicegpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "max_position_embeddings"}  # noqa: RUF012

    vocab_size: int = 32000
    dense_hidden_size: int = 4096
    boundary_widths: list[int] | None = None
    shortcuts: list[str] | None = None
    hidden_size: int | None = None
    embed_projection: bool = False
    head_projection: bool | None = None
    final_norm_weight: bool = False
    final_norm_bias: bool = False
    num_hidden_layers: int = 32
    parallel_blocks: bool = False
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    qk_norm_after_rope: bool = False
    qk_norm_whole: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    pre_norm: bool = True
    post_norm: bool = False
    attention_sinks: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    sliding_window: int | None = None
    layer_key_value_heads: list[int] | None = None
    layer_group_heads: list[int] | None = None
    layer_types: list[str] | None = None
    dense_layer_types: list[str] | None = None
    intermediate_size: int = 11008
    dense_intermediate_size: int | None = None
    layer_neurons: list[int] | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    mlp_output_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    mlp_layer_types: list[str] | None = None
    moe_intermediate_size: int | None = None
    dense_moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    expert_bias: bool = False
    expert_output_bias: bool = False
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    router_in_float32: bool | None = None
    router_bias: bool = False
    score_correction_bias: bool = False
    router_jitter_noise: float = 0.0
    n_group: int = 1
    topk_group: int = 1
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    lm_head_bias: bool = False
    position_embedding: str = "rotary"
    position_offset: int = 0
    no_rope_layers: list[int] | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    layer_rope_parameters: list[dict] | None = None
    rms_norm_eps: float = 1e-6
    inner_norm_eps: float | None = None
    attention_dropout: float | int | None = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    source_model_type: str | None = None
    source_parameters: int | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.dense_hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if self.num_experts else "dense"] * self.num_hidden_layers
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.dense_moe_intermediate_size is None:
            self.dense_moe_intermediate_size = self.moe_intermediate_size
        if self.router_in_float32 is None:
            self.router_in_float32 = self.scoring_func == "sigmoid"
        if self.dense_intermediate_size is None:
            self.dense_intermediate_size = self.intermediate_size
        if self.layer_neurons is not None:
            kinds = {"dense": [], "sparse": []}
            for kind, count in zip(self.mlp_layer_types, self.layer_neurons, strict=False):
                kinds.get(kind, []).append(count)
            self.intermediate_size = max(kinds["dense"], default=self.intermediate_size)
            self.moe_intermediate_size = max(kinds["sparse"], default=self.moe_intermediate_size)
        if "dense" not in self.mlp_layer_types:
            self.intermediate_size = self.moe_intermediate_size
            self.dense_intermediate_size = self.dense_moe_intermediate_size
        if self.boundary_widths is None:
            self.boundary_widths = [self.dense_hidden_size] * (self.num_blocks + 1)
        if self.shortcuts is None:
            self.shortcuts = ["identity"] * self.num_blocks
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if 0 in self.key_value_heads:
            self.dense_layer_types = self.dense_layer_types or list(self.layer_types)
            attending = [
                kind
                for kind, heads in zip(self.dense_layer_types, self.key_value_heads, strict=False)
                if heads
            ]
            self.layer_types = attending + ["full_attention"] * (self.num_hidden_layers - len(attending))
        if self.head_projection is None:
            self.head_projection = (
                self.tie_word_embeddings and self.boundary_widths[-1] != self.dense_hidden_size
            )
        self.hidden_size = self.dense_hidden_size if self.head_projection else self.boundary_widths[-1]
        if self.layer_rope_parameters:
            self.rope_parameters = dict(self.layer_rope_parameters[0])
        if self.inner_norm_eps is None:
            self.inner_norm_eps = self.rms_norm_eps
        absent = (() if self.gated_mlp else ("gate_proj",)) + (() if self.qk_norm else ("q_norm", "k_norm"))
        if self.kv_lora_rank is not None:  # a latent is no heads that could be shared out
            absent += tuple(name for name in self.base_model_tp_plan if ".self_attn." in name)
        # Norms over all heads need all of them on every device.
        whole = _WHOLE_HEADS_PLAN if self.qk_norm and self.qk_norm_whole else {}
        self.base_model_tp_plan = {
            name: whole.get(name.rpartition(".")[2], style)
            for name, style in self.base_model_tp_plan.items()
            if not name.endswith(absent)
        }
        super().__post_init__(**kwargs)

    @property
    def num_blocks(self) -> int:
        """B, the number of blocks, each with a boundary before it."""
        return self.num_hidden_layers * (1 if self.parallel_blocks else 2)

    @property
    def neurons(self) -> list[int]:
        """MLP neurons of each layer, those of one expert where it is a mixture of them."""
        sizes = {"dense": self.intermediate_size, "sparse": self.moe_intermediate_size}
        return self.layer_neurons or [sizes[kind] for kind in self.mlp_layer_types]

    @property
    def dense_neurons(self) -> list[int]:
        """`neurons` before slicing."""
        sizes = {"dense": self.dense_intermediate_size, "sparse": self.dense_moe_intermediate_size}
        return [sizes[kind] for kind in self.mlp_layer_types]

    def is_sparse(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.mlp_layer_types[layer] == "sparse"

    @property
    def key_value_heads(self) -> list[int]:
        """Key/value heads of each layer; 0 where it has no attention."""
        return self.layer_key_value_heads or [self.num_key_value_heads] * self.num_hidden_layers

    @property
    def attention_heads(self) -> list[int]:
        """Query heads of each layer."""
        return [heads * shared for heads, shared in zip(self.key_value_heads, self.group_heads, strict=True)]

    @property
    def group_heads(self) -> list[int]:
        """Query heads that share a key/value head, in each layer."""
        shared = self.num_attention_heads // self.num_key_value_heads
        return self.layer_group_heads or [shared] * self.num_hidden_layers

    @property
    def keeps_all_heads(self) -> bool:
        """Whether every layer has the heads that it had before slicing."""
        return self.layer_key_value_heads is None and self.layer_group_heads is None

    @property
    def value_dim(self) -> int:
        """Columns of attention's output projection that a query head has."""
        return self.head_dim if self.kv_lora_rank is None else self.v_head_dim

    @property
    def attention_rows(self) -> int:
        """Rows of a layer's attention that read the stream, before slicing."""
        if self.kv_lora_rank is None:
            return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        queries = self.num_attention_heads * (self.qk_nope_head_dim + self.head_dim)
        return (self.q_lora_rank or queries) + self.kv_lora_rank + self.head_dim

    @property
    def expansion_elements(self) -> int:
        """Elements of what expands a layer's latents to heads, which neither reads nor writes the stream."""
        if self.kv_lora_rank is None:
            return 0
        heads, passed = self.num_attention_heads, self.qk_nope_head_dim
        queries = (self.q_lora_rank or 0) * heads * (passed + self.head_dim)
        return queries + self.kv_lora_rank * heads * (passed + self.v_head_dim)

    @property
    def attention_types(self) -> list[str]:
        """Kind of attention of each layer; of one without attention, what it was before slicing."""
        return self.dense_layer_types or self.layer_types

    def cache_index(self, layer: int) -> int:
        """Where a layer's keys and values are in transformers' caches: layers without attention have no place there.

        A cache tells its length by its first layer, so that has to be one with attention.
        """
        return sum(heads > 0 for heads in self.key_value_heads[:layer])

    @property
    def longrope_length(self) -> int | None:
        """Tokens past which all positions of a sequence take LongRoPE's other frequencies; None without it."""
        rope = self.rope_parameters or {}
        return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None

    def uses_rope(self, layer: int) -> bool:
        """Whether rotary positions turn the queries and keys of a layer."""
        return self.position_embedding == "rotary" and (
            self.no_rope_layers is None or bool(self.no_rope_layers[layer])
        )

    @property
    def rope_settings(self) -> list[dict]:
        """The different rotary settings among the layers, in the order of their first use."""
        settings: list[dict] = []
        for own in self.layer_rope_parameters or [self.rope_parameters]:
            if own not in settings:
                settings.append(own)
        return settings

    def rope_setting(self, layer: int) -> int:
        """Which of `rope_settings` are a layer's."""
        own = self.layer_rope_parameters
        return 0 if own is None else self.rope_settings.index(own[layer])

    def with_rope(self, rope_parameters: dict) -> "SlicedConfig":
        """A copy for one of `rope_settings`, as transformers' functions of rotary frequencies take it."""
        config = copy.copy(self)
        config.rope_parameters, config.layer_rope_parameters = rope_parameters, None
        return config

    @property
    def query_scaling(self) -> tuple[float, int] | None:
        """`(beta, length)` where the query at position p is `1 + beta log(1 + floor(p / length))` times as large."""
        rope = self.rope_parameters or {}
        beta = rope.get("llama_4_scaling_beta")
        return None if beta is None else (beta, rope["original_max_position_embeddings"])

    def boundary_eps(self, boundary: int) -> float:
        """Epsilon of the stock RMSNorm over `d` columns that stands for the norm over the D original ones.

        `h rsqrt(|h|^2 / D + eps) = sqrt(D / d) * h rsqrt(|h|^2 / d + eps D / d)`; the constant `sqrt(D / d)` is
        folded into the linear layers that read the norm.
        """
        return self.rms_norm_eps * self.dense_hidden_size / self.boundary_widths[boundary]

    def shortcut_rank(self, block: int) -> int | None:
        """Columns of the factor F of block `block`'s shortcut: 0 for identity, None for a dense shortcut."""
        kind = self.shortcuts[block]
        if kind == "dense":
            return None
        if kind == "identity":
            return 0
        return factor_rank(
            self.dense_hidden_size, self.boundary_widths[block], self.boundary_widths[block + 1]
        )

    def validate_architecture(self):
        """Replaces the base check that `hidden_size` is a multiple of the number of heads: here it need not be."""
        check_architecture(self)
