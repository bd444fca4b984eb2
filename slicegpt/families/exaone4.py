"""EXAONE 4: norms behind its blocks and none before them; beside layers with windows, the others have no positions."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .llama import LLAMA, windowed_facts
from .olmo import NORMS_BEHIND, NORMS_BEHIND_LAYER


def exaone4_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that an EXAONE 4 config determines."""
    facts = windowed_facts(config) | NORMS_BEHIND
    if config.sliding_window is None:
        return facts
    return facts | {"no_rope_layers": [int(kind == "sliding_attention") for kind in config.layer_types]}


EXAONE4 = replace(
    LLAMA,
    model_type="exaone4",
    architectures=("Exaone4ForCausalLM",),
    facts=exaone4_facts,
    layer=NORMS_BEHIND_LAYER,
)
