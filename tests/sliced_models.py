"""The tiny models in the forms that the runtime packs: dense, and sliced with every kind of shortcut and head."""

import torch
from test_slicing import sliced
from tiny_models import tiny_model

from slicegpt.families import canonical_fields

FORMS = ["dense", "compact", "dense shortcuts", "varying", "head"]
LENGTHS = [12, 7, 3]


def network(case: str, form: str, dtype: torch.dtype = torch.float64, **changes):
    """A dense Hugging Face model, or one sliced from it (48 columns); `changes` are made to the dense config."""
    model = tiny_model(case, dtype, **changes)
    if form == "dense":
        return model
    parallel = canonical_fields(model).get("parallel_blocks")
    widths = [44, 40, 40, 44] if parallel else [40, 36, 40, 44, 32, 48, 48]
    arguments = {
        "compact": {"widths": 36},
        "dense shortcuts": {"widths": 36, "shortcut": "dense"},
        "varying": {"widths": widths},
        "head": {"widths": 40, "slice_head": True},
    }[form]
    return sliced(model, dtype=dtype, **arguments)[0]
