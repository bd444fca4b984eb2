"""The entry point in the group `vllm.general_plugins`: vLLM calls `register` in every process it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slicegpt.modeling import SlicedConfig

ARCHITECTURE = "SlicedForCausalLM"
VLLM_CLASS = "slicegpt.serving.vllm_model:SlicedForVLLM"


def register() -> None:
    """Make `model_type: slicegpt` known to vLLM. May be called any number of times."""
    from vllm import ModelRegistry

    import slicegpt  # noqa: F401  registers SlicedConfig and the network with transformers

    # By name: a class would import vLLM's model code, which must not touch CUDA before vLLM forks its workers.
    ModelRegistry.register_model(ARCHITECTURE, VLLM_CLASS)


def check_servable(config: SlicedConfig) -> None:
    """Refuse what vLLM's Transformers back end has no attention for, before anything is built.

    Raises:
        ValueError: latent attention.
    """
    if config.kv_lora_rank is not None:
        raise ValueError(
            f"{config.source_model_type}: latent attention (MLA) is not supported: vLLM's Transformers back end caches"
            " keys and values of one size; use transformers' generate"
        )


def heads_of_rank(config: SlicedConfig, layer: int, ranks: int) -> tuple[int, int]:
    """Query heads and key/value heads of a layer on each of so many tensor-parallel ranks.

    As vLLM shards them: query heads are dealt out evenly, and so are key/value heads, or each is on several ranks.

    Raises:
        ValueError: they cannot be.
    """
    heads, key_heads = config.attention_heads[layer], config.key_value_heads[layer]
    if heads % ranks or (key_heads % ranks and ranks % key_heads):
        raise ValueError(
            f"tensor_parallel_size must divide the {heads} query heads of layer {layer}, and divide its {key_heads} "
            f"key/value heads or be a multiple of them, got {ranks}"
        )
    return heads // ranks, max(1, key_heads // ranks)
