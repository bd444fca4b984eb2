"""The shapes of the fused GEMMs in real models: what one layer of each launches, dense and sliced."""

from dataclasses import dataclass
from functools import lru_cache

from slicegpt.bench.models.architectures import sliced_config
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.configuration import factor_rank
from slicegpt.runtime.packing import ACTIVATION_NAMES

# What "all models" means to the benchmarks of the GEMMs; any name in `architectures.MODELS` works.
MODELS = (
    "opt-6.7b",
    "opt-13b",
    "opt-66b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "phi-2",
    "llama-3-8b",
)
# (fraction of columns deleted, form of the shortcuts)
SIZES = ((0.0, "identity"), *((f, s) for f in (0.2, 0.25, 0.3, 0.5) for s in ("compact", "dense")))


@dataclass(frozen=True)
class NormLinearShape:
    """`norm_linear` of h [rows, inner] with a weight [n_scaled + z_columns, inner]."""

    part: str
    inner: int
    n_scaled: int
    z_columns: int
    activation: str
    bias: bool

    @property
    def columns(self) -> int:
        return self.n_scaled + self.z_columns

    @property
    def output_columns(self) -> int:
        return self.columns - (self.n_scaled // 2 if self.activation.endswith("_gated") else 0)


@dataclass(frozen=True)
class RotateAddShape:
    """`rotate_add` of a [rows, inner] and h [rows, width] to [rows, columns]; `inner` includes the `z_columns`."""

    part: str
    inner: int
    width: int
    columns: int
    dense: bool
    bias: bool
    z_columns: int = 0

    @property
    def total_inner(self) -> int:
        """Columns of both sources of the product."""
        return self.inner + (self.width if self.dense else 0)


Launch = NormLinearShape | RotateAddShape


@lru_cache
def launches(model: str, fraction: float, shortcut: str) -> tuple[Launch, ...]:
    """What an inner layer launches, in order; see `layer_launches`.

    Args:
        model: a name in `architectures.MODELS`.
        fraction: of the columns deleted, in [0, 1).
        shortcut: "identity", "dense" or "compact".
    """
    config = sliced_config(model, fraction, "compact" if shortcut == "identity" else shortcut)
    return layer_launches(config, shortcut)


def layer_launches(config: SlicedConfig, shortcut: str) -> tuple[Launch, ...]:
    """The GEMMs of a layer between boundaries of equal width, as `slicegpt.runtime` packs it: q, k, v (and z) in one.

    Args:
        shortcut: "identity", "dense" or "compact"; a compact one is used also where the dense one has fewer numbers.
    """
    width = config.boundary_widths[1]
    rank = factor_rank(config.dense_hidden_size, width, width) if shortcut == "compact" else 0
    heads = config.num_attention_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    act = ACTIVATION_NAMES[config.hidden_act]
    mlp, n_mlp = config.intermediate_size, config.intermediate_size
    if config.gated_mlp:
        act, n_mlp = f"{act}_gated", 2 * n_mlp
    dense = shortcut == "dense"
    bias = config.attention_output_bias

    def read(part, n_scaled, z, activation, has_bias):
        return NormLinearShape(part, width, n_scaled, z, activation, has_bias)

    def write(part, inner):
        return RotateAddShape(part, inner + rank, width, width, dense, bias, rank)

    if config.parallel_blocks:
        return (
            read("qkv", qkv, 0, "none", config.attention_bias),
            read("mlp in", n_mlp, rank, act, config.mlp_bias),
            write("attention and mlp out", heads + mlp),
        )
    return (
        read("qkv", qkv, rank, "none", config.attention_bias),
        write("attention out", heads),
        read("mlp in", n_mlp, rank, act, config.mlp_bias),
        write("mlp out", mlp),
    )
