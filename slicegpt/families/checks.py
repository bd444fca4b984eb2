"""What a checkpoint's config must and must not say, whatever its family: one line for each, before weights are read."""

import math
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slicegpt.errors import SliceGPTError, first_line

# A family's own names of what `SlicedConfig` calls otherwise.
_THEIR_NAMES = {
    "dense_hidden_size": ("hidden_size",),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "n_inner"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "num_key_value_heads": ("num_kv_heads",),
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
}
_LEARNED = {"prelu", "xielu"}  # activations with weights of their own
_COUNTS = (
    "dense_hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_config(config: PreTrainedConfig) -> None:
    """Refuse the settings that transformers obeys in every architecture and the canonical network cannot.

    Raises:
        SliceGPTError: attention that is not causal, layers that differ in shape, an encoder beside the decoder.
    """
    kind = config.model_type
    # transformers' masks become bidirectional in every decoder whose config says so.
    if getattr(config, "is_causal", True) is not True:
        raise SliceGPTError(
            f"{kind}: is_causal={config.is_causal!r} is not supported: attention must be causal"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise SliceGPTError(f"{kind}: is_encoder_decoder=True is not supported: the model must be a decoder")
    if getattr(config, "is_heterogeneous", False):
        raise SliceGPTError(
            f"{kind}: per_layer_config is not supported: all layers must have the same shape and settings"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and not (type(window) is int and window < 2**31):
        raise SliceGPTError(f"{kind}: sliding_window must be a number of tokens, or null, got {window!r}")
    # transformers asks for probabilities even where nothing is dropped.
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not 0 <= value <= 1:
            raise SliceGPTError(f"{kind}: {name} must lie in [0, 1], got {value}")
    kinds = getattr(config, "layer_types", None) or []
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise SliceGPTError(
            f"{kind}: layer_types must be of 'full_attention' and 'sliding_attention', got {sorted(set(kinds))}"
        )
    if "sliding_attention" in kinds and window is None:
        raise SliceGPTError(
            f"{kind}: sliding_window must be a number where layer_types has 'sliding_attention'"
        )
    for name in ("vocab_size", "hidden_size", "num_attention_heads"):
        if getattr(config, name) < 1:
            raise SliceGPTError(f"{kind}: {name} must be at least 1, got {getattr(config, name)}")


def check_facts(config: PreTrainedConfig, facts: dict, learned_activation: bool = False) -> None:
    """Refuse facts (see `Family.facts`) that describe no network, by the names that the config gives them.

    Args:
        learned_activation: the family knows where the weights of an xIELU are.

    Raises:
        SliceGPTError: a count below 1, heads that cannot be shared out, an activation with weights of its own, ...
    """

    def refuse(name: str, expected: str) -> None:
        names = (name, *_THEIR_NAMES.get(name, ()))
        theirs = next((known for known in names if hasattr(config, known)), name)
        raise SliceGPTError(f"{config.model_type}: {theirs} must be {expected}, got {facts[name]!r}")

    for name in _COUNTS:
        value = facts.get(name, 1)
        if not isinstance(value, int) or value < 1:
            refuse(name, "a whole number of at least 1")
    heads = facts["num_attention_heads"]
    if heads % facts.get("num_key_value_heads", heads):
        refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if "head_dim" not in facts and facts["dense_hidden_size"] % heads:
        refuse("dense_hidden_size", f"a multiple of num_attention_heads ({heads})")
    eps = facts["rms_norm_eps"]
    if not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        refuse("rms_norm_eps", "finite and at least 0")
    window = facts.get("sliding_window")
    if window is not None and window < 1:
        refuse("sliding_window", "at least 1, or null")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if facts.get(name) is not None and not 0 < facts[name] < math.inf:
            refuse(name, "finite and above 0, or null")
    problem = _problem_of_activation(facts["hidden_act"])
    if learned_activation and facts["hidden_act"] == "xielu":
        problem = None
    if problem:
        refuse("hidden_act", problem)


def _problem_of_activation(name: str) -> str | None:
    """What an activation must be where `name` is none that the network can have."""
    if name not in ACT2FN or name in _LEARNED:
        return f"one of {', '.join(sorted(set(ACT2FN) - _LEARNED))}"
    try:
        activation = ACT2FN[name]
    except Exception as error:  # some of them need packages or a GPU
        return f"an activation that this machine has ({first_line(error)})"
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return "an activation without weights of its own"  # a later release may have more of them
    return None


def rotary_parameters(
    config: PreTrainedConfig, head_dim: int, partial: bool, settings: dict | None = None
) -> dict:
    """`SlicedConfig.rope_parameters` of a config with rotary positions.

    Args:
        head_dim: entries of an attention head.
        partial: the family rotates only `partial_rotary_factor` of a head. In the other families transformers ignores a
            stray factor where frequencies are not scaled, and fails where they are.
        settings: in place of `config.rope_parameters`.

    Raises:
        SliceGPTError: a kind of scaling that transformers does not know, numbers out of range, an odd rotary part.
    """
    given = config.rope_parameters if settings is None else settings
    family, rope = config.model_type, dict(given or {})
    kind, known = rope.get("rope_type"), ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in known:
        raise SliceGPTError(
            f"{family}: rope_parameters: rope_type must be one of {', '.join(known)}, got {kind!r}"
        )
    for name, number in _numbers(rope):
        if not math.isfinite(number):
            raise SliceGPTError(f"{family}: rope_parameters: {name} must be finite, got {number}")
    theta = rope.get("rope_theta")
    if not isinstance(theta, int | float) or theta <= 0:
        raise SliceGPTError(f"{family}: rope_theta must be a number above 0, got {theta!r}")
    fraction = rope.get("partial_rotary_factor", 1.0)
    if not isinstance(fraction, int | float) or (partial and not 0 < fraction <= 1):
        raise SliceGPTError(f"{family}: partial_rotary_factor must lie in (0, 1], got {fraction!r}")
    if not partial and fraction != 1:
        if kind != "default":
            raise SliceGPTError(
                f"{family}: partial_rotary_factor={fraction} is not supported with rope_type {kind!r}: this"
                " architecture rotates whole heads"
            )
        del rope["partial_rotary_factor"]
    if kind == "proportional" and fraction != 1:
        raise SliceGPTError(
            f"{family}: partial_rotary_factor={fraction} is not supported with rope_type 'proportional'"
        )
    rotated = int(head_dim * fraction) if partial else head_dim
    if rotated < 2 or rotated % 2:
        raise SliceGPTError(
            f"{family}: head_dim={head_dim} (hidden_size / num_attention_heads where not given) and"
            f" partial_rotary_factor={fraction} must leave an even number of entries to rotate, got {rotated}"
        )
    rope.pop("llama_4_scaling_beta", None)  # obeyed by Ministral 3 alone, which puts it back
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if kind == "longrope" and (not isinstance(factors, list) or len(factors) != rotated // 2):
            raise SliceGPTError(
                f"{family}: rope_parameters: {name} must be a list of {rotated // 2} numbers, one a rotary pair"
            )
    return rope


def layer_rotary_facts(config: PreTrainedConfig, head_dim: int, settings: list[dict]) -> dict:
    """The facts of a config with rotary settings for each layer, in the form of `rope_parameters`.

    Raises:
        SliceGPTError: as `rotary_parameters`; or LongRoPE, whose frequencies change with the length of the sequence.
    """
    layers = [rotary_parameters(config, head_dim, False, own) for own in settings]
    if any(own["rope_type"] == "longrope" for own in layers):
        raise SliceGPTError(
            f"{config.model_type}: rope_parameters: rope_type 'longrope' is not supported: it must be the same in"
            " all layers"
        )
    if all(own == layers[0] for own in layers):
        return {"rope_parameters": layers[0]}
    return {"rope_parameters": layers[0], "layer_rope_parameters": layers}


def _numbers(values: dict) -> Iterable[tuple[str, float]]:
    for name, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                yield name, number


def check_head_dim(config: PreTrainedConfig) -> None:
    """Where attention takes `hidden_size / num_attention_heads` whatever `head_dim` says, the two must agree."""
    expected = config.hidden_size // config.num_attention_heads
    given = getattr(config, "head_dim", None)
    if given not in (None, expected):
        raise SliceGPTError(
            f"{config.model_type}: head_dim must be hidden_size / num_attention_heads = {expected}, got {given}"
        )


def check_even_heads(config: PreTrainedConfig) -> None:
    """Without rotary positions nothing else asks for heads of an even size; attention kernels do."""
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim % 2:
        raise SliceGPTError(
            f"{config.model_type}: hidden_size / num_attention_heads must be even, got {config.hidden_size} /"
            f" {config.num_attention_heads} = {head_dim}"
        )
