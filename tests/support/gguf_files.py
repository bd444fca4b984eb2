"""GGUF files of small Hugging Face models, written as llama.cpp's converter writes them."""

import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PERMUTED = ("llama", "mistral")
ONE_PLUS = ("nemotron", "gemma3_text")


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metadata: dict | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """Write `model` in float32.

    Args:
        metadata: settings to add, or to leave out where None; keys without a prefix are the architecture's.
        tensors: tensors to add, or to leave out where None.
    """
    import gguf

    kind = model.config.model_type
    name = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    settings = {f"{name}.{key}": value for key, value in architecture_settings(model).items()}
    settings |= {
        key if "." in key and key.split(".")[0] in ("general", "split", name) else f"{name}.{key}": value
        for key, value in (metadata or {}).items()
    }
    architecture = settings.pop("general.architecture", name)
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in settings.items():
        if type(value) is int and not 0 <= value < 2**32:
            writer.add_int64(key, value)
        elif value is not None:
            kinds = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            kinds.get(type(value), writer.add_array)(key, value)
    add_tokenizer(writer, tokenizer)
    arrays = parameters(model, name) | setting_tensors(model) | (tensors or {})
    for tensor, array in arrays.items():
        if array is not None:
            writer.add_tensor(tensor, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def architecture_settings(model: PreTrainedModel) -> dict:
    config = model.config
    rope, heads = flat_rope(config), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    for eps, key in (
        ("rms_norm_eps", "layer_norm_rms_epsilon"),
        ("layer_norm_eps", "layer_norm_epsilon"),
        ("norm_epsilon", "layer_norm_epsilon"),
        ("norm_eps", "layer_norm_epsilon"),
    ):
        if hasattr(config, eps):
            settings[f"attention.{key}"] = getattr(config, eps)
    if head_dim != config.hidden_size // heads:
        settings |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if getattr(config, "sliding_window", None):
        settings["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] in ("linear", "yarn"):
        settings |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] in ("yarn", "longrope"):
        settings["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return settings


def flat_rope(config) -> dict:
    """Of a model with rotary settings for each kind of layer, those of the layers without a window."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def setting_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Rotary settings that GGUF keeps in tensors."""
    rope = flat_rope(model.config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"]) for name in ("long", "short")}
    if rope["rope_type"] == "llama3":
        scaled = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0].numpy()
        plain = rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
        return {"rope_freqs.weight": plain / scaled}
    return {}


def parameters(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, config, arrays = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers), model.config, {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        array, theirs = parameter.detach().float().numpy(), names.get_name(module)
        part = theirs.split(".")[-1]
        if config.model_type in PERMUTED and part in heads:
            array = array.reshape(heads[part], 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if config.model_type in ONE_PLUS and part.endswith("norm") and suffix == "weight":
            array = array + 1
        arrays[f"{theirs}.{suffix}"] = array
    return arrays


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
