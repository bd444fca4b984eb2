"""What layers, tokens and throughput should take on a GPU: the kernels of `kernel_times` in a row.

Shapes are named ones (`slicegpt.bench.models.architectures.MODELS`), weights of 16 bits, shortcuts compact.
"""

from slicegpt.bench.models.architectures import sliced_config
from slicegpt.bench.models.kernel_times import LAUNCH, Ceilings, Heads, attention_seconds, product_seconds
from slicegpt.bench.models.shapes import NormLinearShape, launches
from slicegpt.modeling import SlicedConfig

# Of a step besides the layers' and the head's: embedding, angles (clamped, read, cosines, sines), argmax, token,
# position, slot.
STEP_LAUNCHES = 9
# Of the products' rate, what attention of prompts reaches, by major compute capability. 8: FlashAttention-2 on an A100
# (arXiv 2307.08691: 50 to 73 %); 9: the same on an H100 (arXiv 2407.08608: 35 %); 7: assumed to be the same.
PROMPT_ATTENTION = {7: 0.35, 8: 0.6, 9: 0.35}
# How often rotary positions move keys and queries through memory (two products, a shift), and launches of them, of the
# cache's two copies, of attention and of its result.
ROTARY_PASSES, ATTENTION_LAUNCHES = 7, 7


def heads_of(config: SlicedConfig) -> Heads:
    """A layer's, with 16-bit keys and values."""
    return Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)


def shortcut_of(fraction: float) -> str:
    """The shortcuts of a named shape."""
    return "compact" if fraction else "identity"


def step_seconds(
    shape: str,
    fraction: float,
    batch: int,
    context: int,
    capacity: int,
    device: Ceilings,
    overlap: bool = True,
) -> float:
    """A decoding step of the runtime, one CUDA graph: a token for each of `batch` sequences.

    context, capacity: tokens of a sequence in the cache, and those that there is room for.
    """
    config = sliced_config(shape, fraction)
    layer = sum(
        product_seconds(launch, batch, device, overlap)
        for launch in launches(shape, fraction, shortcut_of(fraction))
    )
    layer += attention_seconds(heads_of(config), batch, context, capacity, device, overlap)
    head = NormLinearShape("head", config.hidden_size, config.vocab_size, 0, "none", False)
    return (
        config.num_hidden_layers * layer
        + product_seconds(head, batch, device, overlap)
        + STEP_LAUNCHES * LAUNCH
    )


def layer_seconds(shape: str, fraction: float, batch: int, tokens: int, device: Ceilings) -> float:
    """One layer of the runtime on prompts of so many tokens, as `slicegpt bench layers` times it."""
    config, rows = sliced_config(shape, fraction), batch * tokens
    heads = heads_of(config)
    products = sum(
        product_seconds(launch, rows, device) for launch in launches(shape, fraction, shortcut_of(fraction))
    )
    scored = 4 * batch * tokens**2 / 2 * heads.queries * heads.size  # causal: half of the scores
    rate = device.bfloat16 * PROMPT_ATTENTION[device.capability[0]]
    keys, queries = heads.keys * heads.size, heads.queries * heads.size
    moved = ROTARY_PASSES * (keys + queries) + 2 * 2 * keys + 2 * queries
    return products + scored / rate + 2 * rows * moved / device.copy + ATTENTION_LAUNCHES * LAUNCH
