"""transformers' own tests of a model, run on ours: `prepare.py` lays this file into transformers' tests.

It stands there as tests/models/slicegpt/test_modeling_slicegpt.py, so its relative imports are transformers'.
"""

import unittest

import torch
from transformers import StaticCache
from transformers.models.auto import modeling_auto

from slicegpt.modeling import (
    SlicedConfig,
    SlicedForCausalLM,
    SlicedForQuestionAnswering,
    SlicedForSequenceClassification,
    SlicedForTokenClassification,
    SlicedModel,
)

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...test_training_mixin import TrainingTesterMixin

# The mixins find what a class is for, and which labels it takes, by its name among transformers' own.
for kind, model_class in {
    "": SlicedModel,
    "FOR_CAUSAL_LM_": SlicedForCausalLM,
    "FOR_SEQUENCE_CLASSIFICATION_": SlicedForSequenceClassification,
    "FOR_TOKEN_CLASSIFICATION_": SlicedForTokenClassification,
    "FOR_QUESTION_ANSWERING_": SlicedForQuestionAnswering,
}.items():
    getattr(modeling_auto, f"MODEL_{kind}MAPPING_NAMES")["slicegpt"] = model_class.__name__

# Tests that cannot say anything of this network, and why; those that transformers skips itself are not listed.
EMPTY = "takes the maximum over each parameter, and a compact shortcut to the dense width has a factor of no elements"
LEARNED = (
    "turns positions by other frequencies, and reads past the table of positions: learned ones do neither"
)
INAPPLICABLE = {
    "test_torch_save_load": (
        "CompactTest OPTLikeTest ParallelTest SlidingWindowTest LayerNeuronsTest QKNormTest",
        EMPTY,
    ),
    "test_model_rope_scaling_from_config_0_linear": ("OPTLikeTest", LEARNED),
    "test_model_rope_scaling_from_config_1_dynamic": ("OPTLikeTest", LEARNED),
    "test_model_rope_scaling_from_config_2_yarn": ("OPTLikeTest", LEARNED),
}

SHAPE = {
    "vocab_size": 99,
    "dense_hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COMPACT = {"boundary_widths": [24, 24, 26, 28, 32], "shortcuts": ["compact"] * 4}
BIASES = ("attention_bias", "attention_output_bias", "mlp_bias", "mlp_output_bias", "lm_head_bias")
WITH_BIASES = dict.fromkeys(BIASES, True)


class SlicedTester:
    """A small configuration and inputs for it, as transformers' mixins ask for them."""

    batch_size = 3
    seq_length = 7
    is_training = True
    causal_lm_class = SlicedForCausalLM
    sequence_classification_class = SlicedForSequenceClassification

    def __init__(self, fields: dict):
        self.fields = SHAPE | fields
        config = self.get_config()
        self.num_hidden_layers, self.num_attention_heads = (
            config.num_hidden_layers,
            config.num_attention_heads,
        )
        self.vocab_size = config.vocab_size
        self.hidden_size = config.boundary_widths[0]  # what the mixin compares hidden_states[0] with

    def get_config(self) -> SlicedConfig:
        return SlicedConfig(**self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[SlicedConfig, dict]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class SlicedSuite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    fields: dict  # of the config, beside SHAPE
    all_model_classes = (
        SlicedModel,
        SlicedForCausalLM,
        SlicedForSequenceClassification,
        SlicedForTokenClassification,
        SlicedForQuestionAnswering,
    )
    model_tester = None

    def setUp(self):
        configurations, reason = INAPPLICABLE.get(self._testMethodName, ("", ""))
        if type(self).__name__ in configurations.split():
            self.skipTest(reason)
        self.model_tester = SlicedTester(self.fields)
        self.config_tester = ConfigTester(self, config_class=SlicedConfig, **self.model_tester.fields)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _check_hidden_states_for_generate(
        self, batch_size, hidden_states, prompt_length, output_length, config, use_cache=False
    ):
        """The mixin's check with this network's widths: a layer's own before each, the head's at last."""
        step = 1 if config.parallel_blocks else 2
        widths = [*config.boundary_widths[:-1:step], config.hidden_size]
        assert len(hidden_states) == output_length - prompt_length
        for generated, states in enumerate(hidden_states):
            tokens = 1 if use_cache and generated else prompt_length + generated
            expected = [(batch_size, tokens, width) for width in widths]
            assert [tuple(state.shape) for state in states] == expected


class IdentityTest(SlicedSuite, unittest.TestCase):
    """The dense model."""

    fields: dict = {}  # noqa: RUF012


class CompactTest(SlicedSuite, unittest.TestCase):
    fields = COMPACT


class DenseShortcutTest(SlicedSuite, unittest.TestCase):
    """Widths that go down and up."""

    training_overfit_steps = 500  # not 300: 16 columns learn more slowly
    fields = {"boundary_widths": [28, 20, 24, 16, 24], "shortcuts": ["dense"] * 4}  # noqa: RUF012


class TiedTest(SlicedSuite, unittest.TestCase):
    """One table for embedding and head, each with its projection."""

    fields = {  # noqa: RUF012
        "boundary_widths": [24, 24, 26, 28, 28],
        "shortcuts": ["compact"] * 4,
        "tie_word_embeddings": True,
        "embed_projection": True,
        "final_norm_weight": True,
    }


class OPTLikeTest(SlicedSuite, unittest.TestCase):
    fields = COMPACT | {
        "num_key_value_heads": 4,
        "gated_mlp": False,
        "hidden_act": "relu",
        "position_embedding": "learned",
        "position_offset": 2,
        **WITH_BIASES,
    }


class ParallelTest(SlicedSuite, unittest.TestCase):
    """Attention and MLP side by side, half of a head turned."""

    fields = {  # noqa: RUF012
        "parallel_blocks": True,
        "gated_mlp": False,
        "hidden_act": "gelu_new",
        "boundary_widths": [24, 24, 32],
        "shortcuts": ["compact"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        **WITH_BIASES,
    }


class SlidingWindowTest(SlicedSuite, unittest.TestCase):
    """A layer of each kind; that with a window keeps, and sees, only as many tokens as it reaches."""

    fields = COMPACT | {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        heads, reach = config.num_key_value_heads, config.sliding_window
        kept = (
            reach if isinstance(past_key_values, StaticCache) else reach - 1
        )  # a static one has the new token's slot
        for layer, length in zip(past_key_values.layers, (seq_length, min(seq_length, kept)), strict=True):
            assert layer.keys.shape == layer.values.shape == (batch_size, heads, length, config.head_dim)

    def _check_attentions_for_generate(
        self, batch_size, attentions, prompt_length, output_length, config, decoder_past_key_values
    ):
        if decoder_past_key_values is None:
            arguments = (attentions, prompt_length, output_length, config, decoder_past_key_values)
            return super()._check_attentions_for_generate(batch_size, *arguments)
        assert len(attentions) == output_length - prompt_length
        for generated, layers in enumerate(attentions):
            keys = prompt_length + generated
            tokens = 1 if generated else keys
            full, windowed = (tuple(layer.shape) for layer in layers)
            assert full[:3] == windowed[:3] == (batch_size, config.num_attention_heads, tokens)
            # A static cache has slots for what is to come; one that may be cropped (assisted decoding) keeps more than
            # the window reaches. Masks hide both.
            static = isinstance(decoder_past_key_values, StaticCache)
            assert full[3] >= keys if static else full[3] == keys
            assert min(keys, config.sliding_window) <= windowed[3] <= keys


class LayerNeuronsTest(SlicedSuite, unittest.TestCase):
    """Another number of neurons in every MLP."""

    fields = COMPACT | {"intermediate_size": 40, "layer_neurons": [40, 24]}


class QKNormTest(SlicedSuite, unittest.TestCase):
    fields = COMPACT | {"qk_norm": True, "head_dim": 16}
