"""Token ids and calibration samples."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slicegpt.calibration import calibration_hash, encode_text, sample_batches, tokens
from slicegpt.errors import SliceGPTError

# --- token ids ---

# Llama 3's expression: punctuation takes the newlines that follow it.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt4_like(documents):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def llama2_like(documents):
    """SentencePiece: no pre-tokenizer, a blank is put before the text, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def unigram(documents):
    """T5: no BOS, an EOS after the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["gpt2", "gpt4", "llama2", "unigram"])
def tokenizer(request, documents, tiny_tokenizer):
    if request.param == "gpt2":
        return tiny_tokenizer
    return {"gpt4": gpt4_like, "llama2": llama2_like, "unigram": unigram}[request.param](documents)


@pytest.mark.parametrize("chunk", [400, 1777, 20_000])
def test_pieces_give_the_tokens_of_the_whole(chunk, tokenizer, documents, monkeypatch):
    text = "\n\n".join(documents)
    pieces = []
    stitch = tokens._stitch
    monkeypatch.setattr(tokens, "_stitch", lambda *args: pieces.append(stitch(*args)) or pieces[-1])
    ids = encode_text(text, tokenizer, chunk=chunk)
    assert ids.dtype == torch.int64
    assert ids.tolist() == tokenizer(text).input_ids
    assert pieces[0] is not None, "the text was encoded in one piece after all"


def test_text_without_a_place_to_cut(tokenizer):
    text = "naïve 漢字\n" * 500
    assert encode_text(text, tokenizer, chunk=100).tolist() == tokenizer(text).input_ids


def test_tokens_across_words_are_noticed(documents):
    """A tokenizer whose tokens hold several words cannot be cut anywhere: the whole text is encoded."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False)
    tokenizer.train_from_iterator(documents[:4], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = documents[0] * 4
    assert any(" " in token.strip() for token in wrapped.tokenize(text))
    assert encode_text(text, wrapped, chunk=500).tolist() == wrapped(text).input_ids


def test_bos_comes_once(tiny_tokenizer, documents):
    ids = encode_text("\n\n".join(documents), tiny_tokenizer, chunk=1000)
    assert ids[0] == tiny_tokenizer.bos_token_id
    assert (ids == tiny_tokenizer.bos_token_id).sum() == 1


# --- samples ---


def rows_of(batches):
    return [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def test_samples_are_different_windows_of_the_text(tiny_tokenizer, documents):
    ids = tiny_tokenizer("\n\n".join(documents)).input_ids
    windows = [ids[i : i + 100] for i in range(0, len(ids) - 99, 100)]
    batches = sample_batches(documents, tiny_tokenizer, nsamples=20, seqlen=100, batch_size=8)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(8, 100), (8, 100), (4, 100)]
    assert all(batch.attention_mask.all() and batch.input_ids.dtype == torch.int64 for batch in batches)
    drawn = [windows.index(row) for row in rows_of(batches)]
    assert len(set(drawn)) == 20
    assert drawn != sorted(drawn)


def test_all_windows_can_be_drawn(tiny_tokenizer, documents):
    count = len(tiny_tokenizer("\n\n".join(documents)).input_ids) // 500
    rows = rows_of(sample_batches(documents, tiny_tokenizer, nsamples=count, seqlen=500))
    assert len(set(map(tuple, rows))) == count


@pytest.mark.parametrize("varied", [False, True])
def test_samples_depend_on_the_seed_alone(varied, tiny_tokenizer, documents):
    def draw(**options):
        return sample_batches(
            documents, tiny_tokenizer, **{"nsamples": 8, "seqlen": 300, "varied_seqlen": varied, **options}
        )

    rows, hashed = rows_of(draw()), calibration_hash(draw())
    for size in (1, 3, 64):
        assert rows_of(draw(batch_size=size)) == rows
        assert calibration_hash(draw(batch_size=size)) == hashed
    assert calibration_hash(draw(seed=1)) != hashed
    torch.manual_seed(123)  # the global generator is not used
    assert rows_of(draw()) == rows


def test_fewer_samples_are_the_first_ones(tiny_tokenizer, documents):
    def draw(nsamples):
        return rows_of(sample_batches(documents, tiny_tokenizer, nsamples=nsamples, seqlen=64))

    assert draw(5) == draw(12)[:5]


def test_varied_lengths(tiny_tokenizer, documents):
    batches = sample_batches(
        [*documents, "", "  \n"], tiny_tokenizer, nsamples=16, seqlen=900, batch_size=5, varied_seqlen=True
    )
    rows = rows_of(batches)
    assert sorted(rows) == sorted(tiny_tokenizer(text).input_ids[:900] for text in documents)
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 5
    for batch in batches:
        assert batch.input_ids.shape[1] == batch.attention_mask.sum(dim=1).max()
        assert (batch.attention_mask.diff(dim=1) <= 0).all(), "padding is on the right"
        assert (batch.input_ids[batch.attention_mask == 0] == tiny_tokenizer.pad_token_id).all()
        assert batch.tokens == batch.attention_mask.sum()


def test_tokenizer_without_padding_token(documents):
    batches = sample_batches(documents, unigram(documents), nsamples=4, seqlen=2000, varied_seqlen=True)
    assert (batches[0].attention_mask == 0).any()


def test_hash_tells_samples_apart(tiny_tokenizer, documents):
    batches = sample_batches(documents, tiny_tokenizer, nsamples=4, seqlen=50, batch_size=2)
    before = calibration_hash(batches)
    batches[1].input_ids[1, 7] += 1
    changed = calibration_hash(batches)
    batches[1].attention_mask[1, 49] = 0
    assert len({before, changed, calibration_hash(batches), calibration_hash(batches[::-1])}) == 4


def test_text_too_short(tiny_tokenizer, documents):
    count = len(tiny_tokenizer("\n\n".join(documents)).input_ids)
    available = count // 1000
    message = (
        rf"{available + 1} samples of 1000 tokens need .* the text has {count:,}, enough for {available} "
    )
    with pytest.raises(SliceGPTError, match=message):
        sample_batches(documents, tiny_tokenizer, nsamples=available + 1, seqlen=1000)
    with pytest.raises(SliceGPTError, match="17 samples were asked, the text has 16 documents"):
        sample_batches([*documents, ""], tiny_tokenizer, nsamples=17, seqlen=1000, varied_seqlen=True)


@pytest.mark.parametrize("argument", ["nsamples", "seqlen", "batch_size"])
def test_arguments_out_of_range(argument, tiny_tokenizer, documents):
    with pytest.raises(SliceGPTError, match=f"{argument}: must be at least 1, got 0"):
        sample_batches(documents, tiny_tokenizer, **{argument: 0})
