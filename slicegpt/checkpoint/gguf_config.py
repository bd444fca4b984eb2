"""The Hugging Face config of a GGUF file, from all of its settings.

transformers rebuilds a config from the keys that it knows and passes over the others: a file with scaled rotary
positions, a sliding window or a head size of its own becomes another model, and nothing says so. Here every key of the
architecture is one of three: it has a field, it is known to change nothing, or it is refused by its name.

Keys and their meaning: the GGUF specification (ggml-org/ggml, docs/gguf.md) and llama.cpp's own converter.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedConfig

from slicegpt.errors import SliceGPTError
from slicegpt.families import FAMILIES


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is told to transformers.

    Attributes:
        model_type: its family's.
        eps: the config's field of the norms' epsilon, and the key that holds it.
        partial_rotary: a part of each head may be rotated.
        window: whether its Hugging Face class knows a sliding window.
        head_dim: whether its Hugging Face class takes a head size of its own.
        biases: the config's field that says so, and tensors of a layer that are there where it is True.
        permuted: llama.cpp stores queries and keys with neighbouring rotary pairs.
        one_plus: its Hugging Face class adds 1 to the scales of its norms, and llama.cpp stores them with it.
    """

    model_type: str
    eps: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    partial_rotary: bool = False
    window: bool = False
    head_dim: bool = True
    biases: Mapping[str, str] | None = None
    permuted: bool = False
    one_plus: bool = False


_LAYER_NORM = "attention.layer_norm_epsilon"
ARCHITECTURES = {
    "llama": Architecture(
        "llama", permuted=True, biases={"attention_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"}
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", biases={"attention_bias": "attn_output.bias"}),
    "phi3": Architecture("phi3", partial_rotary=True, window=True),
    "gemma3": Architecture("gemma3_text", window=True, one_plus=True),
    "stablelm": Architecture(
        "stablelm",
        ("layer_norm_eps", _LAYER_NORM),
        partial_rotary=True,
        head_dim=False,
        biases={"use_qkv_bias": "attn_q.bias"},
    ),
    "starcoder2": Architecture(
        "starcoder2", ("norm_epsilon", _LAYER_NORM), window=True, biases={"use_bias": "attn_q.bias"}
    ),
    "nemotron": Architecture(
        "nemotron",
        ("norm_eps", _LAYER_NORM),
        partial_rotary=True,
        biases={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_down.bias"},
        one_plus=True,
    ),
}
# What a Mistral model is called in GGUF; its class differs from Llama's only by the window.
_MISTRAL = Architecture("mistral", permuted=True, window=True)

# Settings under an architecture's name that change nothing, and others that change nothing at these values.
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual")
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,  # llama.cpp takes 0 for "none" in all of these
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "attention.scale": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
# Tensors that hold settings: no parameter of any class has their place.
SETTINGS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# What Llama 3.1 to 3.3 say of their rotary positions; `rope_freqs.weight` holds the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Settings:
    """The metadata of one architecture, read key by key; what nobody has asked for in the end is refused."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str):
        self.metadata = {
            key.removeprefix(f"{prefix}."): value
            for key, value in metadata.items()
            if key.startswith(f"{prefix}.")
        }
        self.prefix = prefix
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None, kind: type = float) -> Any:
        """A number, or `default` where the file has none."""
        self.asked.add(key)
        value = self.metadata.get(key, default)
        good = (int, float) if kind is float else kind
        if value is not None and (
            not isinstance(value, good) or (kind is not bool and isinstance(value, bool))
        ):
            raise SliceGPTError(f"{self.prefix}.{key} must be one {kind.__name__}, got {value!r:.40}")
        return value

    def need(self, key: str, kind: type = int) -> Any:
        value = self.get(key, kind=kind)
        if value is None:
            raise SliceGPTError(f"{self.prefix}.{key} is missing")
        return value

    def refuse(self, key: str, expected: str) -> SliceGPTError:
        return SliceGPTError(
            f"{self.prefix}.{key} is not supported: {expected}, got {self.metadata.get(key)!r:.40}"
        )

    def check_all_asked(self) -> None:
        for key, value in self.metadata.items():
            if key in self.asked or key in _WITHOUT_EFFECT or (key in _NEUTRAL and value == _NEUTRAL[key]):
                continue
            raise SliceGPTError(
                f"{self.prefix}.{key} = {value!r:.40} is not supported: it would be lost, and the model another one"
            )


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    setting: Callable[[str], np.ndarray],
) -> tuple[PreTrainedConfig, Architecture]:
    """The config of a file.

    Args:
        metadata: all key-value pairs.
        shapes: of all tensors, the rows first.
        setting: reads one of the tensors `SETTINGS` that are among `shapes`.

    Raises:
        SliceGPTError: an architecture or a setting that transformers' classes cannot represent; the line names the key.
    """
    name = metadata.get("general.architecture")
    if experts := metadata.get(f"{name}.expert_count"):
        raise SliceGPTError(
            f"{name}.expert_count = {experts!r:.40}: mixtures of experts are not read from GGUF files; take the "
            "model's Hugging Face folder"
        )
    if name not in ARCHITECTURES:
        raise SliceGPTError(f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    for key, expected in (("general.type", "model"), ("split.count", 1)):
        if metadata.get(key, expected) not in (expected, 0):
            raise SliceGPTError(f"{key} must be {expected!r}, got {metadata[key]!r}: it is not a whole model")
    settings, architecture = Settings(metadata, name), ARCHITECTURES[name]
    window = settings.get("attention.sliding_window", kind=int) or None
    if window is not None and name == "llama":
        architecture = _MISTRAL
    if window is not None and not architecture.window:
        raise settings.refuse("attention.sliding_window", "its attention has no window")
    heads, width = settings.need("attention.head_count"), settings.need("embedding_length")
    if heads < 1 or width < heads:
        raise SliceGPTError(f"{name}.attention.head_count must lie in [1, {width}], got {heads}")
    head_dim = settings.get("attention.key_length", width // heads, kind=int)
    if settings.get("attention.value_length", head_dim, kind=int) != head_dim:
        raise settings.refuse("attention.value_length", f"it must equal the keys' {head_dim}")
    if head_dim != width // heads and not architecture.head_dim:
        raise settings.refuse("attention.key_length", f"it must be {width // heads}")
    eps, eps_key = architecture.eps
    if "token_embd.weight" not in shapes:
        raise SliceGPTError("the tensor token_embd.weight is missing")
    fields = {
        "vocab_size": int(shapes["token_embd.weight"][0]),
        "hidden_size": width,
        "intermediate_size": settings.need("feed_forward_length"),
        "num_hidden_layers": settings.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("attention.head_count_kv", heads, kind=int),
        "max_position_embeddings": settings.need("context_length"),
        eps: settings.need(eps_key, float),
        "rope_parameters": rotary_settings(settings, architecture, head_dim, shapes, setting),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture.head_dim:
        fields["head_dim"] = head_dim
    if architecture.window:
        fields["sliding_window"] = window
    if name == "phi3":
        fields["original_max_position_embeddings"] = fields["rope_parameters"].get(
            "original_max_position_embeddings", fields["max_position_embeddings"]
        )
    if name == "gemma3":
        fields |= _gemma3_fields(settings, fields["rope_parameters"], fields["num_hidden_layers"], head_dim)
    if name == "stablelm":
        fields["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in shapes
    for field, tensor in (architecture.biases or {}).items():
        fields[field] = f"blk.0.{tensor}" in shapes
    settings.check_all_asked()
    model_class = getattr(transformers, FAMILIES[architecture.model_type].architectures[0])
    return model_class.config_class(architectures=[model_class.__name__], **fields), architecture


# Of Gemma 3 27B, the one size whose scores are divided by the root of `hidden_size / num_attention_heads`: llama.cpp
# knows it by its layers, for no key says so.
_GEMMA3_27B_LAYERS = 62


def _gemma3_fields(settings: Settings, rope: dict, layers: int, head_dim: int) -> dict:
    """What llama.cpp's code holds and its files do not: five layers with a window and one without in turn, and of the
    former the base of the rotary frequencies."""
    local = {"rope_type": "default", "rope_theta": settings.get("rope.freq_base_swa", 10000.0)}
    heads, width = settings.need("attention.head_count"), settings.need("embedding_length")
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "query_pre_attn_scalar": width // heads if layers == _GEMMA3_27B_LAYERS else head_dim,
    }


def rotary_settings(
    settings: Settings,
    architecture: Architecture,
    head_dim: int,
    shapes: Mapping[str, tuple[int, ...]],
    setting: Callable[[str], np.ndarray],
) -> dict:
    """`rope_parameters` of the file."""
    rope: dict[str, Any] = {"rope_theta": settings.get("rope.freq_base", 10000.0), "rope_type": "default"}
    rotated = settings.get("rope.dimension_count", head_dim, kind=int)
    if architecture.partial_rotary:
        rope["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise settings.refuse("rope.dimension_count", f"all {head_dim} entries of a head must be rotated")
    kind = settings.get("rope.scaling.type", kind=str)
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear"))
    original = settings.get("rope.scaling.original_context_length", kind=int)
    magnitude = settings.get("rope.scaling.attn_factor")
    present = [name for name in SETTINGS if name in shapes]
    if present == ["rope_freqs.weight"]:
        if kind not in (None, "none", "linear") or factor not in (None, 0, 1) or magnitude not in (None, 1):
            raise settings.refuse("rope.scaling.type", "it must be none beside rope_freqs.weight")
        return rope | _scaled_frequencies(
            setting(present[0]), rope["rope_theta"], settings.need("context_length")
        )
    if present:
        if present != list(SETTINGS[1:]) or architecture.model_type != "phi3":
            raise SliceGPTError(f"the tensor {present[0]} is not supported in a {settings.prefix} model")
        long, short = (setting(name).astype(float).tolist() for name in present)
        longrope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        longrope["original_max_position_embeddings"] = original or settings.need("context_length")
        return rope | longrope | ({} if magnitude is None else {"attention_factor": magnitude})
    if kind in (None, "none") and factor in (None, 0, 1):
        if magnitude not in (None, 1):
            raise settings.refuse("rope.scaling.attn_factor", "it must be 1 without scaled positions")
        return rope
    if kind in (None, "linear"):  # a factor alone means linear
        if magnitude not in (None, 1):
            raise settings.refuse("rope.scaling.attn_factor", "it must be 1 with linear scaling")
        if factor in (None, 0, 1):
            return rope
        return rope | {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor and original:
        # llama.cpp multiplies its own magnitude onto the one of the paper, which is transformers' default.
        betas = {
            name: settings.get(f"rope.scaling.yarn_{name}", default)
            for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
        }
        yarn = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        if magnitude not in (None, 1):
            yarn["attention_factor"] = magnitude * (0.1 * math.log(factor) + 1.0)
        return rope | yarn | betas
    raise settings.refuse("rope.scaling.type", "expected none, linear, or yarn with its factor and length")


def _scaled_frequencies(factors: np.ndarray, theta: float, context: int) -> dict:
    """What divides every frequency: Llama 3's own settings where they give these factors, else the factors as they are.

    LongRoPE with the same factors for short and long texts divides the frequencies by them, and does nothing else.
    """
    factors = factors.astype(np.float64)
    scale = float(f"{factors.max():.6g}")  # what float32 holds of it
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    low, high, length = _LLAMA3.values()
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if np.allclose(1 / ((1 - smooth) / scale + smooth), factors, rtol=1e-5, atol=0):
        return {"rope_type": "llama3", "factor": scale, **_LLAMA3}
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }
