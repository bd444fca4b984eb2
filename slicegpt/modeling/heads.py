"""Heads other than the language model's: classifiers of sequences and tokens, and extractive question answering.

Their forward passes and losses are transformers' generic ones. What they read is `SlicedModel`'s output,
`config.hidden_size` columns. Weights of a causal model's folder load into them by name; the head starts fresh.
"""

from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .configuration import SlicedConfig
from .network import SlicedModel, SlicedPreTrainedModel

# The generic constructors ask AutoModel for the trunk, which does not know the classes of a self-contained folder;
# so these call the one after them.


class SlicedForSequenceClassification(GenericForSequenceClassification, SlicedPreTrainedModel):
    """Scores [batch, `num_labels`] of the last token of each row that is not padding."""

    def __init__(self, config: SlicedConfig):
        SlicedPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SlicedModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SlicedForTokenClassification(GenericForTokenClassification, SlicedPreTrainedModel):
    """Scores [batch, tokens, `num_labels`]; `classifier_dropout` of the config, if there is one, else 0.1."""

    def __init__(self, config: SlicedConfig):
        SlicedPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SlicedModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SlicedForQuestionAnswering(GenericForQuestionAnswering, SlicedPreTrainedModel):
    """Scores [batch, tokens] of where an answer starts, and of where it ends."""

    def __init__(self, config: SlicedConfig):
        SlicedPreTrainedModel.__init__(self, config)
        self.model = SlicedModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
