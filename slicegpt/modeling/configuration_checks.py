"""What the numbers of a `SlicedConfig` must and must not say."""

from transformers import PreTrainedConfig

SHORTCUT_KINDS = ("identity", "compact", "dense")
SCORING_FUNCTIONS = ("softmax", "sigmoid", "sparsemixer")


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse numbers that describe no network.

    Raises:
        ValueError: the first of them, by its name, and what was expected.
    """
    widths, blocks, dense = config.boundary_widths, config.num_blocks, config.dense_hidden_size
    if len(widths) != blocks + 1:
        raise ValueError(f"boundary_widths must hold {blocks + 1} widths, got {len(widths)}")
    if not all(1 <= width <= dense for width in widths):
        raise ValueError(f"boundary_widths must lie in [1, {dense}], got {widths}")
    fewest = 1 if config.layer_neurons is None else 0
    if not fewest <= config.intermediate_size <= config.dense_intermediate_size:
        raise ValueError(
            f"intermediate_size must lie in [{fewest}, {config.dense_intermediate_size}], got "
            f"{config.intermediate_size}"
        )
    _check_experts(config)
    if len(config.neurons) != config.num_hidden_layers or min(config.neurons) < 0:
        raise ValueError(
            f"layer_neurons must hold {config.num_hidden_layers} numbers of at least 0, got {config.layer_neurons}"
        )
    if len(config.shortcuts) != blocks or not set(config.shortcuts) <= set(SHORTCUT_KINDS):
        raise ValueError(f"shortcuts must hold {blocks} of {SHORTCUT_KINDS}, got {config.shortcuts}")
    for block, kind in enumerate(config.shortcuts):
        width, following = widths[block], widths[block + 1]
        if (kind == "identity" and width != following) or (kind == "compact" and width > following):
            raise ValueError(f"shortcuts[{block}] cannot be {kind!r} from width {width} to {following}")
    table = dense if config.embed_projection else widths[0]
    if config.tie_word_embeddings and config.hidden_size != table:
        raise ValueError(
            f"tie_word_embeddings needs a head as wide as the embedding, {table} columns, got {config.hidden_size}"
        )
    if config.position_embedding not in ("rotary", "learned", "none"):
        raise ValueError(
            f"position_embedding must be 'rotary', 'learned' or 'none', got {config.position_embedding!r}"
        )
    turned = config.no_rope_layers
    if turned is not None and (len(turned) != config.num_hidden_layers or not set(turned) <= {0, 1}):
        raise ValueError(
            f"no_rope_layers must hold {config.num_hidden_layers} of 0 and 1, one a layer, got {turned}"
        )
    ropes = config.layer_rope_parameters
    if ropes is not None and len(ropes) != config.num_hidden_layers:
        raise ValueError(
            f"layer_rope_parameters must hold {config.num_hidden_layers} dictionaries, one a layer, got {len(ropes)}"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(config, name)
        if cap is not None and not 0 < cap < float("inf"):
            raise ValueError(f"{name} must be finite and above 0, got {cap}")
    if not (config.pre_norm and not config.post_norm) and (
        config.parallel_blocks or set(config.shortcuts) != {"identity"}
    ):
        raise ValueError(
            "pre_norm=False and post_norm=True need blocks one after the other and a stream that keeps its columns"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})"
        )
    kept, all_heads = config.key_value_heads, config.num_key_value_heads
    if len(kept) != config.num_hidden_layers or not all(0 <= heads <= all_heads for heads in kept):
        raise ValueError(
            f"layer_key_value_heads must hold {config.num_hidden_layers} numbers in [0, {all_heads}], got "
            f"{config.layer_key_value_heads}"
        )
    if not any(kept):
        raise ValueError("layer_key_value_heads must leave attention to one layer at least, got 0 for all")
    shared = config.num_attention_heads // all_heads
    if len(config.group_heads) != config.num_hidden_layers or not all(
        1 <= heads <= shared for heads in config.group_heads
    ):
        raise ValueError(
            f"layer_group_heads must hold {config.num_hidden_layers} numbers in [1, {shared}], got "
            f"{config.layer_group_heads}"
        )
    whole = {0, config.num_attention_heads}
    if config.qk_norm and config.qk_norm_whole and set(config.attention_heads) - whole:
        raise ValueError(
            "qk_norm_whole: the norm is over all heads, so a layer has all of them or none, got "
            f"{config.attention_heads}"
        )
    if config.kv_lora_rank is not None:
        _check_latents(config, whole)
    kinds = config.dense_layer_types
    if kinds is not None and len(kinds) != config.num_hidden_layers:
        raise ValueError(f"dense_layer_types must hold {config.num_hidden_layers} kinds, got {kinds}")


def _check_latents(config: PreTrainedConfig, whole: set[int]) -> None:
    if set(config.attention_heads) - whole:
        raise ValueError(
            f"kv_lora_rank: heads share one latent, so a layer has all of them or none, got {config.attention_heads}"
        )
    for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
        if (value := getattr(config, name)) is None or value < 1:
            raise ValueError(f"{name} must be at least 1 where there is a latent, got {value}")
    if config.qk_norm or config.attention_sinks or config.position_embedding != "rotary":
        raise ValueError("kv_lora_rank needs rotary positions, and neither qk_norm nor attention_sinks")


def _check_experts(config: PreTrainedConfig) -> None:
    kinds, experts = config.mlp_layer_types, config.num_experts
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= {"dense", "sparse"}:
        raise ValueError(
            f"mlp_layer_types must hold {config.num_hidden_layers} of 'dense' and 'sparse', one a layer, got {kinds}"
        )
    if "sparse" not in kinds:
        return
    if not all(count for kind, count in zip(kinds, config.neurons, strict=False) if kind == "sparse"):
        raise ValueError(f"layer_neurons must be at least 1 in layers of experts, got {config.neurons}")
    if not 1 <= config.num_experts_per_tok <= experts:
        raise ValueError(
            f"num_experts_per_tok must lie in [1, num_experts], got {config.num_experts_per_tok} of {experts}"
        )
    if not 1 <= config.moe_intermediate_size <= config.dense_moe_intermediate_size:
        raise ValueError(
            f"moe_intermediate_size must lie in [1, {config.dense_moe_intermediate_size}], got "
            f"{config.moe_intermediate_size}"
        )
    if config.scoring_func not in SCORING_FUNCTIONS:
        raise ValueError(f"scoring_func must be one of {SCORING_FUNCTIONS}, got {config.scoring_func!r}")
    if config.scoring_func == "sparsemixer" and config.num_experts_per_tok != 2:
        raise ValueError(
            f"num_experts_per_tok must be 2 with 'sparsemixer', got {config.num_experts_per_tok}"
        )
    if experts % config.n_group or not 1 <= config.topk_group <= config.n_group:
        raise ValueError(
            f"n_group must divide num_experts ({experts}) and topk_group lie in [1, n_group], got "
            f"{config.n_group} and {config.topk_group}"
        )
    if config.parallel_blocks or not config.gated_mlp:
        raise ValueError("experts need gated_mlp, and blocks that are not parallel")
