"""A dense Hugging Face model as the canonical network: the same function, full width, identity shortcuts."""

from transformers import PreTrainedModel

from slicegpt.families import canonical_fields
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.schedule import Shape, constant_widths, plan
from slicegpt.slicing import SlicingOptions, slice_model


def to_canonical(model: PreTrainedModel) -> SlicedForCausalLM:
    """Fold the norms of a supported dense model into its linear layers; a sliced model comes back as it is.

    The folded weights are computed in float64 and rounded once to the model's dtype; they take as much memory again.

    Errors: `SliceGPTError` for a model of no supported family.
    """
    if isinstance(model, SlicedForCausalLM):
        return model
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, fields["dense_hidden_size"]), Shape())
    canonical, _ = slice_model(model, config, (), SlicingOptions(dtype=model.dtype, device=model.device))
    canonical.generation_config = model.generation_config
    return canonical.to(model.device)
