"""One of the ranks of tests/slicing/test_ranks.py, started by torchrun: rank 0 saves what came out to a file."""

import sys
from contextlib import contextmanager

import torch
from support.sliced_models import batches
from support.tiny_models import tiny_model, token_ids

from slicegpt.calibration import CalibrationBatch
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.evaluation.perplexity import shared_losses
from slicegpt.families import canonical_fields
from slicegpt.hardware import ranks as module
from slicegpt.hardware.ranks import Ranks, joined
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.slicing.mixture_moments import MixtureMoments

BATCHES = 7
EXPERTS = 12


def calibration() -> list[CalibrationBatch]:
    """Batches of which one is padded."""
    padded, *others = batches(BATCHES)
    mask = padded.attention_mask.clone()
    mask[1, 9:] = 0
    return [CalibrationBatch(padded.input_ids, mask), *others]


def slice_together(ranks: Ranks):
    """The tiny Llama of float64, with fewer columns, neurons and heads; the sliced model, the report."""
    model = tiny_model("llama", torch.float64)
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 36, False), Shape(kv_groups=(1, 2, 0)))
    config = type(config).from_dict(config.to_dict() | {"intermediate_size": 48})
    options = SlicingOptions(
        dtype=torch.float64,
        ranks=ranks,
        neuron_multiple=8,
        vocabulary_prior=0.5,
        fitted=0.7,
        allocate="prices",
    )
    return slice_model(model, config, calibration(), options, held_out=token_ids(3, 16, 99))


def slice_experts(ranks: Ranks):
    """A tiny Qwen2-MoE of float64, one of its layers dense, with fewer columns and neurons; the sliced model, the
    report.

    Few tokens, or none, are routed to the last four experts: their scores are near zero, those of the eight others
    far from it to both sides.
    """
    model = tiny_model("qwen2-moe", torch.float64, num_experts=EXPERTS)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].mlp.gate.weight[8:] *= torch.tensor([0.8, 0.6, 0.4, 0.2])[:, None]
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 36, False), Shape(neurons=0.25, round_to=8))
    options = SlicingOptions(dtype=torch.float64, ranks=ranks, neuron_multiple=8, fitted=0.7)
    return slice_model(model, config, calibration(), options, held_out=token_ids(3, 16, 99))


def few_tokens(report) -> list:
    """Block by block, the experts that the record names for their few tokens."""
    return [entry.get("few_tokens") for entry in report.refit]


@contextmanager
def ranks_with_tokens():
    """Within it, a list of how many ranks have tokens of each expert, one entry [experts] for every reduction."""
    reduce, found = MixtureMoments.reduce_, []

    def noted(self, ranks):
        some = (self.tokens > 0).long()
        ranks.sum_(some)
        found.append(some)
        reduce(self, ranks)

    MixtureMoments.reduce_ = noted
    try:
        yield found
    finally:
        MixtureMoments.reduce_ = reduce


def losses_of_windows(ranks: Ranks) -> list[float]:
    model = tiny_model("llama", torch.float32)
    return shared_losses(model, token_ids(7, 16, 5), 2, None, "cpu", ranks)


def exchanged(ranks: Ranks) -> dict:
    """Messages in many pieces, of tensors that are not contiguous."""
    module.PIECE = 256
    generator = torch.Generator().manual_seed(ranks.rank)
    rows = torch.randn(5, 13, dtype=torch.float64, generator=generator)
    matrix, tall, number = rows.mT @ rows, rows.mT.clone().mT, rows.sum()
    ranks.reduce_symmetric_(matrix)
    ranks.reduce_(tall)
    ranks.reduce_(number)
    value = {
        "transposed": torch.arange(60.0).view(12, 5).mT[:, 1:],
        "half": (torch.ones(3, dtype=torch.bfloat16), torch.tensor(7)),
        "none": [None, torch.empty(0, 4), "text"],
    }
    received = ranks.decide(lambda: value)
    same = torch.equal(received["transposed"], value["transposed"])
    same &= received["transposed"].stride() == value["transposed"].stride()
    same &= torch.equal(received["half"][0], value["half"][0]) and received["half"][1] == 7
    same &= (
        received["none"][0] is None and received["none"][1].shape == (0, 4) and received["none"][2] == "text"
    )
    right = torch.tensor([float(same), 1.0])
    ranks.sum_(right)
    module.PIECE = 1 << 26
    return {"matrix": matrix, "tall": tall, "number": number, "right": right}


if __name__ == "__main__":
    with joined("cpu") as (these, _):
        outcome = {"exchanged": exchanged(these), "losses": losses_of_windows(these)}
        sliced, report = slice_together(these)
        if these.first:
            outcome |= {"state": sliced.state_dict(), "neurons": sliced.config.neurons}
            outcome |= {"ridge_search": report.ridge_search, "tokens": report.tokens}
        with ranks_with_tokens() as shared:
            sliced, report = slice_experts(these)
        if these.first:
            outcome["experts"] = {"state": sliced.state_dict(), "few_tokens": few_tokens(report)}
            outcome["experts"] |= {"ridge_search": report.ridge_search, "ranks_with_tokens": shared}
            torch.save(outcome, sys.argv[1])
