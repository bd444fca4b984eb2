"""`bench.commands.speculative`: what it counts."""

import copy

import torch
from support.sliced_models import sliced
from support.tiny_models import tiny_model, token_ids

from slicegpt.bench.commands.speculative import describe, measure, prepare_draft


def test_a_copy_has_every_proposal_accepted_and_a_slice_gives_the_same_tokens():
    dense = tiny_model("llama", torch.float32)
    drafts = {"copy": copy.deepcopy(dense), "slice": sliced(dense, 36, dtype=torch.float32)[0]}
    for draft in drafts.values():
        prepare_draft(draft, 4)
    prompts = [token_ids(1, 12, seed) for seed in range(2)]
    rows = {row["draft"]: row for row in describe(measure(dense, drafts, prompts, 10), 20)}
    assert rows["copy"]["accepted"] == "100.0%"  # rounds of 4 + 1: two passes for 10 tokens
    assert rows["copy"]["tokens a pass"] == 5
    assert rows["alone"] == {"draft": "alone", "accepted": "", "tokens a pass": 1, "differing": 0} | {
        "tokens/s": rows["alone"]["tokens/s"],
        "ratio": 1,
    }
    assert 1 <= rows["slice"]["tokens a pass"] <= 5
    assert rows["slice"]["differing"] == 0
