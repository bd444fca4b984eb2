"""Perplexity against a plain float64 cross entropy over all logits at once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.tiny_models import tiny_model, token_ids
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from slicegpt.calibration import encode_text
from slicegpt.errors import SliceGPTError
from slicegpt.evaluation.perplexity import perplexity
from slicegpt.modeling import losses

VOCABULARY = 512
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, **options))


def opt() -> OPTForCausalLM:
    # OPT-350m's shape: the trunk ends with a projection to the width of the embedding.
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False))


def gemma2() -> Gemma2ForCausalLM:
    config = Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    config.final_logit_softcapping = 0.05  # far below the logits, so that leaving it out shows
    return Gemma2ForCausalLM(config)


MODELS = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "opt": opt, "gemma2": gemma2}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return llama().double()


def plain_nll(model, ids: torch.Tensor) -> float:
    """Mean loss by definition: -log softmax(logits)[next token], one window at a time."""
    with torch.no_grad():
        losses = [
            -model(row[None]).logits[0, :-1].double().log_softmax(-1).gather(1, row[1:, None]) for row in ids
        ]
    return torch.cat(losses).mean().item()


def windows_of(documents, tokenizer, seqlen) -> torch.Tensor:
    ids = torch.tensor(tokenizer("\n\n".join(documents)).input_ids)
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


@pytest.mark.parametrize("name", MODELS)
def test_matches_plain_cross_entropy(name, tiny_tokenizer, documents, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    # 50 positions at a time: pieces end inside windows, and the last piece of a batch is shorter.
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 50 * VOCABULARY)
    expected = plain_nll(model, windows_of(documents, tiny_tokenizer, 64)[:7])
    result = perplexity(model, tiny_tokenizer, documents, seqlen=64, batch_size=3, max_windows=7)
    # Both are float64 sums of 441 losses of about 6: rounding is below 441 * 2^-53 relative.
    assert result.nll == pytest.approx(expected, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-12)
    assert (result.windows, result.tokens) == (7, 7 * 63)


def test_all_windows_and_the_partial_one_dropped(model, tiny_tokenizer, documents):
    windows = windows_of(documents[:1], tiny_tokenizer, 128)
    result = perplexity(model, tiny_tokenizer, documents[:1], seqlen=128, batch_size=4)
    assert result.windows == len(windows)
    assert result.nll == pytest.approx(plain_nll(model, windows), rel=1e-12)


def test_uniform_model_has_the_vocabulary_as_perplexity(model, tiny_tokenizer, documents):
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, tiny_tokenizer, documents, seqlen=32, max_windows=4)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_float64_in_every_dtype(dtype, model, tiny_tokenizer, documents):
    """The only rounding is the model's own: the same logits, widened, give the same loss."""
    model = model.to(dtype).eval()
    # One window a batch on both sides: the products have the same shapes, except for the head's, whose rows
    # do not depend on each other but may be summed in another order: 2^-24 relative on logits below 1 in
    # float32.
    expected = plain_nll(model, windows_of(documents, tiny_tokenizer, 64)[:4])
    result = perplexity(model, tiny_tokenizer, documents, seqlen=64, max_windows=4)
    assert result.nll == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-4)


def test_batch_size_does_not_matter(model, tiny_tokenizer, documents):
    results = [
        perplexity(model, tiny_tokenizer, documents, seqlen=64, batch_size=size, max_windows=5).nll
        for size in (1, 2, 5)
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-12)


def test_the_head_sees_few_positions_at_a_time(model, tiny_tokenizer, documents, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 20 * VOCABULARY)
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].numel() // 32))
    perplexity(model, tiny_tokenizer, documents, seqlen=64, batch_size=2, max_windows=2)
    assert sum(rows) >= 2 * 63
    assert max(rows) <= 20


def test_softmax_is_not_in_float32():
    """As many classes as SmolLM2 has: a float32 softmax is off by 1e-6 here, a float64 one by 1e-15."""
    torch.manual_seed(0)
    logits, targets = 10 * torch.randn(64, 49152), torch.randint(49152, (64,))
    expected = logits.double().logsumexp(-1) - logits.double()[range(64), targets]
    torch.testing.assert_close(losses.token_losses(logits, targets), expected, rtol=1e-13, atol=0)


def test_dropout_is_off(tiny_tokenizer, documents):
    torch.manual_seed(0)
    model = opt()
    assert model.config.dropout > 0
    results = {
        perplexity(m, tiny_tokenizer, documents, seqlen=32, max_windows=2).nll
        for m in (model.eval(), model.train())
    }
    assert len(results) == 1


def test_training_modes_come_back(model, tiny_tokenizer, documents):
    model.train()
    model.model.norm.eval()
    perplexity(model, tiny_tokenizer, documents, seqlen=32, max_windows=1)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


def test_text_shorter_than_a_window(model, tiny_tokenizer):
    with pytest.raises(SliceGPTError, match=r"documents: the text has \d+ tokens, .* seqlen=2048"):
        perplexity(model, tiny_tokenizer, ["A short text."])


@pytest.mark.parametrize(("argument", "value"), [("seqlen", 1), ("batch_size", 0), ("max_windows", 0)])
def test_arguments_out_of_range(argument, value, model, tiny_tokenizer, documents):
    with pytest.raises(SliceGPTError, match=f"{argument}: must be at least .*, got {value}"):
        perplexity(model, tiny_tokenizer, documents, **{argument: value})


def test_window_beyond_the_positions(tiny_tokenizer, documents):
    with pytest.raises(SliceGPTError, match="seqlen: 64 is beyond the model's 32 positions"):
        perplexity(llama(max_position_embeddings=32), tiny_tokenizer, documents, seqlen=64)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_that_is_not_finite_names_the_window(batch_size, model, tiny_tokenizer, documents):
    windows = windows_of(documents, tiny_tokenizer, 32)[:12]
    # Poison a token that the first windows do not have.
    seen = set(windows[0].tolist())
    bad, token = next((i, t) for i, row in enumerate(windows.tolist()) for t in row[:-1] if t not in seen)
    first = next(i for i, row in enumerate(windows.tolist()) if token in row[:-1])
    assert bad == first > 0
    model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(SliceGPTError, match=f"model: the loss of window {first} is nan"):
        perplexity(model, tiny_tokenizer, documents, seqlen=32, batch_size=batch_size, max_windows=12)


def test_mean_loss_beyond_exp(model, tiny_tokenizer, documents):
    model.lm_head.weight.data *= 1e6
    with pytest.raises(SliceGPTError, match=r"the mean loss of a token is .* nats"):
        perplexity(model, tiny_tokenizer, documents, seqlen=32, max_windows=2)


def test_result_is_plain_data(model, tiny_tokenizer, documents):
    result = perplexity(model, tiny_tokenizer, documents, seqlen=32, max_windows=1)
    fields = dataclasses.asdict(result)
    assert set(fields) == {"perplexity", "tokens", "nll", "windows", "seconds"}
    assert all(type(value) in (int, float) for value in fields.values())


@pytest.mark.model
def test_trained_model_knows_its_text(smollm2, documents):
    """A sanity check that no mistake in the protocol survives: a shifted target would give thousands."""
    model, tokenizer = smollm2
    result = perplexity(model, tokenizer, documents, seqlen=256, batch_size=2, max_windows=2)
    ids = encode_text("\n\n".join(documents), tokenizer)[: 2 * 256].view(2, 256)
    # float32 model, batches of 2 against 1: the logits differ by 1e-4 at most, their mean loss by far less.
    assert result.nll == pytest.approx(plain_nll(model, ids), rel=1e-5)
    assert 5 < result.perplexity < 40


@pytest.mark.parametrize("memory", [1, 2, 3, 100])
def test_automatic_batches_shrink_until_they_fit(memory, monkeypatch):
    """A model that holds `memory` windows at most: every window is measured once, in its place."""
    model, windows = tiny_model("llama", torch.float32), token_ids(7, 12)
    expected = losses.window_losses(model, windows)
    trunk, sizes = model.model.forward, []

    def forward(input_ids, **kwargs):
        if len(input_ids) > memory:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(input_ids))
        return trunk(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward)
    actual = losses.window_losses(model, windows, "auto")
    # Float32 sums of 11 losses of about 5 nats, in other orders: some 1e-6 of them.
    assert actual == pytest.approx(expected, rel=1e-5)
    assert max(sizes[2:]) <= min(memory, 4)  # the probe comes first; of 7 windows the first batch takes 4
    if memory < len(windows):
        with pytest.raises(torch.OutOfMemoryError):
            losses.window_losses(model, windows, memory + 1)


@pytest.mark.parametrize("size", [0, -1, "all", 1.5, True])
def test_batch_sizes_that_are_none(size, tiny_tokenizer):
    with pytest.raises(SliceGPTError, match=r"batch_size: must be at least 1, or 'auto', got "):
        perplexity(tiny_model("llama", torch.float32), tiny_tokenizer, ["text"], batch_size=size)
