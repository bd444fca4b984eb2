"""Was the calibration text enough: losses against the models' own, and the rule that warns."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.calibration import Source, sample_sources
from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields, source_of
from slicegpt.slicing import slice_model
from slicegpt.slicing.held_out import EXCESS, follows_samples, held_out_check, held_out_warning

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer) + 24)


@pytest.fixture(scope="module")
def drawn(documents, tiny_tokenizer):
    return sample_sources([Source("text", documents=documents)], tiny_tokenizer, 8, 32)


@pytest.fixture(scope="module")
def sliced(model, drawn):
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, fields["dense_hidden_size"] // 2), Shape(round_to=8))
    return slice_model(model, config, drawn.batches)[0]


def test_against_the_models_own_losses(model, sliced, drawn):
    check = held_out_check(model, sliced, drawn, CPU)

    @torch.no_grad()
    def loss(network, ids):
        return network(ids, labels=ids).loss.item()  # the mean over tokens, in float32

    for name, ids in (("seen", drawn.seen), ("held_out", drawn.unseen)):
        assert math.isclose(check[name], loss(sliced, ids) - loss(model, ids), abs_tol=2e-5)
    assert (check["windows"], check["tokens"]) == (4, 4 * 31)
    assert check["difference"] == pytest.approx(
        check["held_out"] - check["seen"], abs=2e-5
    )  # rounded to 1e-5
    assert check["chose_ridge"] is False


def test_models_that_are_not_loaded(model, sliced, drawn, tiny_tokenizer, tmp_path):
    """From their files, and from memory: the figures of the loaded models."""
    expected = held_out_check(model, sliced, drawn, CPU)
    sources = []
    for name, each in (("dense", model), ("sliced", sliced)):
        each.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        sources.append(open_dense(str(tmp_path / name)))
    assert not any(source.in_memory for source in sources)
    assert held_out_check(*sources, drawn, CPU) == expected
    assert held_out_check(source_of(model), sources[1], drawn, CPU) == expected
    assert held_out_check(model, source_of(sliced), drawn, CPU) == expected


def test_windows_that_chose_the_ridge_are_named(model, sliced, drawn):
    few = replace(drawn, unseen=drawn.held_out)
    assert held_out_check(model, sliced, few, CPU)["chose_ridge"] is True
    assert held_out_check(model, sliced, few, CPU, ridge_chosen=False)["chose_ridge"] is False


def test_a_text_that_is_all_there_is(model, sliced, drawn):
    everything = replace(drawn, unseen=drawn.unseen[:0], seen=drawn.seen[:0])
    assert held_out_check(model, sliced, everything, CPU) is None


def test_a_loss_that_is_not_finite_costs_the_figure_and_not_the_run(model, sliced, drawn, caplog):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)
    with caplog.at_level("WARNING", logger="slicegpt"):
        assert held_out_check(broken, sliced, drawn, CPU) is None
    assert "held-out windows were not compared: model: the loss of window 0 is nan" in caplog.text


@pytest.mark.parametrize(
    ("seen", "held_out", "tokens", "expected"),
    [
        (0.2, 0.21, 2044, False),  # 1.05 times
        (0.2, 0.3, 2044, True),  # 1.5 times
        (0.2, 0.2 * EXCESS - 0.001, 10**6, False),  # just below the ratio, however many tokens tell
        (0.2, 0.2 * EXCESS + 0.001, 10**6, True),
        (-0.02, 0.62, 1020, True),  # 8 x 256 tokens: a ratio says nothing
        (0.0, 0.64, 1020, True),
        (0.002, 0.17, 1020, True),
        (-0.3, -0.1, 1020, True),  # better than the dense model on both, and by far more on what it saw
        (-0.1, -0.1, 1020, False),
        (-0.003, 0.004, 1020, False),  # 1 % of perplexity is nothing to speak of
        (0.3, -0.1, 1020, False),
        (0.1, 0.16, 124, False),  # a third of a window: chance
        (0.0, 0.0, 1020, False),
    ],
)
def test_rule(seen, held_out, tokens, expected):
    assert follows_samples(seen, held_out, tokens) is expected


def test_chance_hardly_warns():
    """Two sets of 1020 tokens of one distribution `p`, judged by a `q` near it: at most 1 in 20 differ by so much.

    The rule asks for two standard deviations, which a normal variable exceeds in 2.3 % of all cases on one side; 2000
    pairs tell that from 5 % by more than six standard deviations.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60, generator=generator).double()
    p = logits.softmax(0)
    q = (logits + 0.35 * torch.randn(60, generator=generator).double()).softmax(0)
    drawn = torch.multinomial(p, 2000 * 2 * 1020, replacement=True, generator=generator)
    losses = (p / q).log()[drawn].view(2000, 2, 1020).mean(dim=2)
    assert 0.02 < losses.mean() < 0.2
    assert sum(follows_samples(*pair, 1020) for pair in losses.tolist()) < 0.05 * 2000


def check(seen: float, held_out: float, chose_ridge: bool = False) -> dict:
    excess = round(held_out / seen, 3) if min(seen, held_out) > 0.01 else None
    difference = held_out - seen
    return {
        "windows": 4,
        "tokens": 2044,
        "seen": seen,
        "held_out": held_out,
        "difference": difference,
        "excess": excess,
        "chose_ridge": chose_ridge,
    }


def test_warning():
    assert held_out_warning(check(0.2, 0.21)) is None
    assert held_out_warning(check(0.0, 0.0)) is None
    assert "0.300 nats a token, 1.50 times what it loses on those it saw" in held_out_warning(check(0.2, 0.3))
    negative = held_out_warning(check(-0.02, 0.62))
    assert "loses 0.620 nats a token, and -0.020 on those it saw, 0.640 less;" in negative
    assert "λ" not in negative
    assert "λ was chosen by the same windows" in held_out_warning(check(0.2, 0.3, chose_ridge=True))
