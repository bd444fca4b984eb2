"""The tiny models sliced: by one call, and in every form that the runtime packs (kinds of shortcut and head)."""

import torch
from support.tiny_models import FUSED_CASES, NORMS_BEHIND, tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, slice_model

FORMS = ["dense", "compact", "dense shortcuts", "varying", "head"]
# Every case in every form that it has.
CASE_FORMS = [
    (case, form) for case in FUSED_CASES for form in (["dense", "neurons"] if case in NORMS_BEHIND else FORMS)
]
LENGTHS = [12, 7, 3]


def batches(count: int = 6, batch: int = 4, length: int = 16) -> list[CalibrationBatch]:
    ids = [token_ids(batch, length, seed) for seed in range(count)]
    return [CalibrationBatch(tokens, torch.ones_like(tokens)) for tokens in ids]


def sliced(
    model, widths, calibration=None, dtype=torch.float64, shortcut="compact", slice_head=False, **options
):
    fields = canonical_fields(model)
    if isinstance(widths, int):
        widths = constant_widths(fields, widths, slice_head)
    shape = Shape(shortcut, options.get("orientation", "aligned"), slice_head)
    config = plan(fields, widths, shape)
    calibration = batches() if calibration is None else calibration
    options = {"refit": False} | options  # tests/slicing/test_refit.py is about the refit
    return slice_model(model, config, calibration, SlicingOptions(dtype=dtype, **options))


def without_neurons(model, dtype=torch.float64, **options):
    """All columns, and 56 of 80 neurons."""
    fields = canonical_fields(model)
    config = plan(
        fields, constant_widths(fields, fields["dense_hidden_size"]), Shape(neurons=0.3, round_to=8)
    )
    options = {"ridge": 0.1, "neuron_multiple": 8} | options
    return slice_model(model, config, batches(), SlicingOptions(dtype=dtype, **options))[0]


def network(case: str, form: str, dtype: torch.dtype = torch.float64, **changes):
    """A dense Hugging Face model, or one sliced from it (48 columns); `changes` are made to the dense config."""
    model = tiny_model(case, dtype, **changes)
    if form == "dense":
        return model
    if form == "neurons":
        return without_neurons(model, dtype)
    parallel = canonical_fields(model).get("parallel_blocks")
    widths = [44, 40, 40, 44] if parallel else [40, 36, 40, 44, 32, 48, 48]
    arguments = {
        "compact": {"widths": 36},
        "dense shortcuts": {"widths": 36, "shortcut": "dense"},
        "varying": {"widths": widths},
        "head": {"widths": 40, "slice_head": True},
    }[form]
    return sliced(model, dtype=dtype, **arguments)[0]
