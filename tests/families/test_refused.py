"""Every causal language model of transformers is either taken or refused for a reason of its own."""

import re
from pathlib import Path

import pytest
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BertConfig,
    Gemma3nTextConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    ResNetConfig,
    T5Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slicegpt.errors import SliceGPTError
from slicegpt.families import FAMILIES, family_of
from slicegpt.families.refused import REASONS
from slicegpt.modeling import SlicedConfig

# Some names stand for the class of another one: GPT-SW3 is a GPT-2.
KINDS = {
    name: CONFIG_MAPPING[name].model_type for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != "slicegpt"
}


def test_every_causal_language_model_is_taken_or_refused_for_a_reason():
    unknown = sorted(name for name, kind in KINDS.items() if kind not in FAMILIES and kind not in REASONS)
    assert not unknown


def test_nothing_is_both_taken_and_refused():
    assert not set(FAMILIES) & set(REASONS)


def test_the_table_names_nothing_else():
    """A misspelt name would never be found."""
    assert set(REASONS) <= set(KINDS.values())


def test_every_family_is_a_causal_language_model_of_transformers():
    classes = {}
    for name, family in FAMILIES.items():
        classes[name] = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]].__name__
        assert classes[name] in family.architectures
    assert len(set(classes.values())) > len(classes) / 2


def test_the_page_names_every_family():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert not [name for name in FAMILIES if f"`{name}`" not in page]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (BertConfig(), "model_type 'bert' is not supported: it is an encoder that is asked to decode"),
        (
            Gemma3nTextConfig(),
            "model_type 'gemma3n_text' is not supported: its blocks normalise what they write",
        ),
        (MambaConfig(), "model_type 'mamba' is not supported: some of its layers are recurrent"),
        (MixtralConfig(), "model_type 'mixtral' is not supported: its MLPs are mixtures of experts"),
        # No causal language models, so they are not in the table.
        (T5Config(), "model_type 't5' is not supported: it is an encoder-decoder"),
        (LlavaConfig(), "model_type 'llava' is not supported: it takes images or sound beside text"),
        (ResNetConfig(), "model_type 'resnet' is not supported"),
        (SlicedConfig(), "an already sliced model is not supported"),
    ],
)
def test_the_line_says_why_and_names_the_families(config, what):
    with pytest.raises(
        SliceGPTError, match=rf"^model: {re.escape(what)}.*; supported are llama, .*cohere, "
    ) as error:
        family_of(config)
    assert "\n" not in str(error.value)
