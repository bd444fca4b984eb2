"""Which weights of a sliced model are stored in 8 or 4 bits, and how its config says so.

The layers that read and write the stream, the embedding and the head. Shortcuts, projections of the stream, learned
positions, norms and biases keep the model's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slicegpt.errors import SliceGPTError
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.quantized import FORMAT, METHOD, WeightScheme, scheme_of
from slicegpt.recipe import GROUP_SIZES, Recipe

READING = {"attention": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
WRITING = {"attention": "o_proj", "mlp": "down_proj"}
MODULES = {"attention": "self_attn", "mlp": "mlp"}

# What stays in the model's dtype though it is a linear layer: engines ask of every one whether it is left out.
_LEFT_OUT = ("re:.*shortcut$", "re:.*embed_projection$", "re:.*head_projection$")

TABLE = WeightScheme(8)


@dataclass(frozen=True)
class WeightFormat:
    """What `--quantize` asks for.

    Attributes:
        bits: 8 (a scale a row) or 4 (a scale for each group of columns).
        group_size: with 4 bits the largest group, 128, 64 or 32. A layer whose columns are no multiple of it has the
            next smaller one that divides them.
        symmetric: without zero points.
        tables: embedding and head are stored in 8 bits by row; else in the model's dtype.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = True
    tables: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> WeightFormat | None:
        """What a recipe asks for; None: nothing."""
        if recipe.quantize is None:
            return None
        bits = {"int8": 8, "int4": 4}[recipe.quantize]
        return cls(bits, recipe.group_size or 64, not recipe.zero_points, recipe.quantize_tables)

    @property
    def multiple(self) -> int:
        """Widths and neurons have to be multiples of it."""
        return 1 if self.bits == 8 else min(GROUP_SIZES)

    def scheme(self, name: str, columns: int) -> WeightScheme:
        """How a layer of so many columns is stored.

        Raises:
            SliceGPTError: its columns make no whole groups.
        """
        if self.bits == 8:
            return WeightScheme(8)
        for size in sorted(GROUP_SIZES, reverse=True):
            if size <= self.group_size and columns % size == 0:
                return WeightScheme(4, size, self.symmetric)
        smallest = min(GROUP_SIZES)
        raise SliceGPTError(
            f"int4 needs whole groups of {smallest} columns at least, and {name} has {columns}: give round_to a "
            f"multiple of {smallest}, or int8",
            "quantize",
        )


def part_schemes(
    config: SlicedConfig, weights: WeightFormat, layer: int, part: str
) -> dict[str, WeightScheme]:
    """Of each layer's name in a part ("attention" or "mlp") of a decoder layer, how it is stored."""
    step = 1 if config.parallel_blocks else 2
    boundary = step * layer + (1 if part == "mlp" and step == 2 else 0)
    heads = config.key_value_heads[layer] * config.group_heads[layer]
    written = config.neurons[layer] if part == "mlp" else heads * config.head_dim
    root = f"layers.{layer}.{MODULES[part]}"
    names = [name for name in READING[part] if name != "gate_proj" or config.gated_mlp]
    reads = {name: config.boundary_widths[boundary] for name in names}
    return {
        name: weights.scheme(f"{root}.{name}", columns)
        for name, columns in (reads | {WRITING[part]: written}).items()
    }


def with_quantization(config: SlicedConfig, weights: WeightFormat | None) -> SlicedConfig:
    """The config of the model whose weights are stored so, with compressed-tensors' `quantization_config`.

    Raises:
        SliceGPTError: a layer whose columns make no whole groups, or a mixture of experts.
    """
    plain = without_quantization(config)
    if weights is None:
        return plain
    if plain.num_experts:
        raise SliceGPTError("has no form for the weights of experts; leave it out", "quantize")
    if plain.kv_lora_rank is not None:
        raise SliceGPTError("has no form for latent attention; leave it out", "quantize")
    layers: dict[tuple[WeightScheme, str, str], list[int]] = {}
    for layer in range(plain.num_hidden_layers):
        for part, module in MODULES.items():
            for name, scheme in part_schemes(plain, weights, layer, part).items():
                layers.setdefault((scheme, module, name), []).append(layer)
    targets: dict[WeightScheme, list[str]] = {}
    for (scheme, module, name), found in layers.items():
        numbers = r"\d+" if len(found) == plain.num_hidden_layers else f"(?:{'|'.join(map(str, found))})"
        targets.setdefault(scheme, []).append(rf"re:.*layers\.{numbers}\.{module}\.{name}$")
    tables = ["re:.*embed_tokens$", "re:.*lm_head$"]
    if weights.tables:
        targets[TABLE] = targets.get(TABLE, []) + tables
    ignored = [*_LEFT_OUT] + ([] if weights.tables else tables)
    groups = {
        f"group_{index}": _group(scheme, found) for index, (scheme, found) in enumerate(targets.items())
    }
    quantization = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return SlicedConfig.from_dict(plain.to_dict() | {"quantization_config": quantization})


def _group(scheme: WeightScheme, targets: list[str]) -> dict:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def without_quantization(config: SlicedConfig) -> SlicedConfig:
    """The config of the same model in plain numbers; one that is, itself."""
    if not is_quantized(config):
        return config
    plain = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return SlicedConfig.from_dict(plain)


def is_quantized(config) -> bool:
    """Whether a model's config says that its weights are packed."""
    return getattr(config, "quantization_config", None) is not None


def check_plain(config, name: str) -> None:
    """An error for a model whose weights are packed, where plain numbers are needed."""
    if is_quantized(config):
        raise SliceGPTError(f"{name} has weights of 8 or 4 bits; slice without quantize for this", "model")


def common_multiple(round_to: int, weights: WeightFormat | None) -> int:
    """The least multiple of `round_to` that makes whole groups."""
    return round_to if weights is None else math.lcm(round_to, weights.multiple)


def describe_storage(config: SlicedConfig, dtype: str) -> str:
    """How a model's weights are stored, in a few words: "int4 in groups of 64, tables int8"."""
    if not is_quantized(config):
        return dtype
    layers = {
        scheme_of(config, f"layers.{layer}.{module}.{name}")
        for layer in range(config.num_hidden_layers)
        for module, name in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj"))
    }
    scheme = next(iter(layers))
    words = f"int{scheme.bits} by row"
    if scheme.group_size is not None:
        sizes = sorted({own.group_size for own in layers}, reverse=True)
        words = f"int4 in groups of {' and '.join(map(str, sizes))}"
    if not scheme.symmetric:
        words += " with zero points"
    tables = scheme_of(config, "embed_tokens")
    return f"{words}, embedding and head {dtype if tables is None else 'int8 by row'}, the rest {dtype}"
