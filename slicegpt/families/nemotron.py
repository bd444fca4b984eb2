"""MLPs without a gate: Nemotron and Minitron (LayerNorms that scale by `1 + w`), Arcee, Jais 2."""

from dataclasses import replace

from transformers import PreTrainedConfig

from .base import StockForm
from .llama import LLAMA, LLAMA_LAYER, llama_facts
from .rewriting import one_plus, one_plus_norms

UNGATED = replace(LLAMA, layer=replace(LLAMA_LAYER, gate=None))


def nemotron_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Nemotron config determines."""
    return llama_facts(config, config.norm_eps, partial_rotary=True)


def jais2_facts(config: PreTrainedConfig) -> dict:
    """Fields of `SlicedConfig` that a Jais 2 config determines."""
    return llama_facts(config, config.layer_norm_eps)


NEMOTRON = replace(
    UNGATED,
    model_type="nemotron",
    architectures=("NemotronForCausalLM",),
    facts=nemotron_facts,
    mean_subtraction=True,
    rewrite_layer=one_plus_norms,
    rewrite_final_norm=one_plus,
    stock=StockForm(norm_offset=-1.0),
)
ARCEE = replace(UNGATED, model_type="arcee", architectures=("ArceeForCausalLM",))
JAIS2 = replace(
    UNGATED,
    model_type="jais2",
    architectures=("Jais2ForCausalLM",),
    facts=jais2_facts,
    mean_subtraction=True,
)
