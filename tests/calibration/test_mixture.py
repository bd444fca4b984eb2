"""Calibration from several sources: parsing, shares, generated samples, and whether the text was enough."""

import copy
import gc
import math
import re
import weakref

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.calibration import (
    CalibrationBatch,
    Source,
    calibration_hash,
    calibration_warnings,
    coverage,
    load_documents,
    load_sources,
    parse_sources,
    sample_batches,
    sample_sources,
)
from slicegpt.calibration.mixture import share_out
from slicegpt.calibration.self_sampling import (
    SamplingSettings,
    chat_start,
    continue_tokens,
    generate_samples,
    ordinary_tokens,
)
from slicegpt.checkpoint.dense_source import DenseSource, open_dense
from slicegpt.errors import SliceGPTError
from slicegpt.hardware import memory


@pytest.fixture(scope="module")
def files(tmp_path_factory, documents):
    """Two texts, one with a name that is hard to write in a list."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n\n".join(documents[:8]), encoding="utf-8")
    (folder / "b,c:2.txt").write_text("\n\n".join(documents[8:]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    """A random model whose vocabulary is the tokenizer's and some padding, as checkpoints have it."""
    return tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer) + 24)


# --- parsing ---


def test_names_and_weights(files):
    a, b = files / "a.txt", files / "b,c:2.txt"
    assert parse_sources("wikitext2") == [("wikitext2", 1.0)]
    assert parse_sources("wikitext2:2,self:0.5") == [("wikitext2", 2.0), ("self", 0.5)]
    assert parse_sources(f"{a}:3") == [(str(a), 3.0)]
    # An existing file's name is taken as it is; in a list its comma and colon are escaped.
    assert parse_sources(str(b)) == [(str(b), 1.0)]
    escaped = str(b).replace(",", r"\,").replace(":", r"\:")
    assert parse_sources(f"{a},{escaped}:2") == [(str(a), 1.0), (str(b), 2.0)]
    assert parse_sources(rf"{a},{str(b).replace(',', chr(92) + ',')}") == [(str(a), 1.0), (str(b), 1.0)]
    assert parse_sources(r"C:\texts\a.txt") == [(r"C:\texts\a.txt", 1.0)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a:x", "the weight of a must be a number, got 'x'"),
        ("a:0", "the weight of a must be above 0, got 0"),
        ("a:inf", "above 0"),
        ("a:nan", "above 0"),
        ("a,,b", "a source without a name"),
        (":2", "a source without a name"),
        ("a:1,a:2", "a is named twice"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(SliceGPTError, match=message):
        parse_sources(spec)


def test_text_column_needs_a_file_with_columns():
    with pytest.raises(SliceGPTError, match=r"text_column: self has no \.jsonl"):
        load_sources("self", "text")


# --- shares ---


@pytest.mark.parametrize("weights", [[1], [2, 1], [1, 1, 1], [0.1, 7, 3], [5, 0.01]])
@pytest.mark.parametrize("nsamples", [1, 7, 128])
def test_shares_add_up_and_are_the_nearest(nsamples, weights):
    shares = share_out(nsamples, weights)
    assert sum(shares) == nsamples
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - nsamples * weight / sum(weights)) < 1


def windows(batches):
    return [tuple(ids.tolist()) for batch in batches for ids in batch.input_ids]


def test_one_source_is_sample_batches(files, tiny_tokenizer):
    a = str(files / "a.txt")
    drawn = sample_sources(load_sources(a), tiny_tokenizer, 12, 32, 5)
    plain = sample_batches(load_documents(a), tiny_tokenizer, 12, 32, 5)
    assert calibration_hash(drawn.batches) == calibration_hash(plain)
    assert [len(batch.input_ids) for batch in drawn.batches] == [5, 5, 2]


def test_mixture(files, tiny_tokenizer, model):
    """Weights share the samples out; each source's are its own first ones, without overlap, spread evenly."""
    a, b = files / "a.txt", files / "b,c:2.txt"
    spec = f"{a}:2,{b}".replace("b,c:2", r"b\,c\:2") + ",random-tokens:0.5,self:0.5"
    drawn = sample_sources(load_sources(spec), tiny_tokenizer, 32, 24, 8, model=model)
    assert [source["nsamples"] for source in drawn.sources] == [16, 8, 4, 4]
    assert [source["tokens"] for source in drawn.sources] == [16 * 24, 8 * 24, 4 * 24, 4 * 24]
    samples = windows(drawn.batches)
    assert len(set(samples)) == 32
    for path, count in ((a, 16), (b, 8)):
        alone = windows(sample_batches(load_documents(str(path)), tiny_tokenizer, count, 24))
        assert [sample for sample in samples if sample in set(alone)] == alone
    in_a = set(windows(sample_batches(load_documents(str(a)), tiny_tokenizer, 16, 24)))
    assert [sum(sample in in_a for sample in samples[i : i + 8]) for i in range(0, 32, 8)] == [4] * 4
    again = sample_sources(load_sources(spec), tiny_tokenizer, 32, 24, 3, model=model)
    assert calibration_hash(again.batches) == calibration_hash(drawn.batches)


def test_a_mixture_that_cannot_be(files, tiny_tokenizer):
    a = str(files / "a.txt")
    with pytest.raises(SliceGPTError, match="random-tokens's weight leaves it none of 8 samples"):
        sample_sources(load_sources(f"{a}:100,random-tokens:1"), tiny_tokenizer, 8, 32)
    with pytest.raises(SliceGPTError, match="nsamples: " + re.escape(a) + ": .* samples of 32 tokens need"):
        sample_sources(load_sources(f"{a},random-tokens"), tiny_tokenizer, 10**5, 32)
    with pytest.raises(SliceGPTError, match="'self' needs the dense model"):
        sample_sources(load_sources("self"), tiny_tokenizer, 8, 32)


# --- the model's own text ---


def test_generated_samples(model, tiny_tokenizer):
    ordinary = set(ordinary_tokens(tiny_tokenizer).tolist())
    assert ordinary == set(range(len(tiny_tokenizer))) - {0, 1, 2}
    ids = generate_samples(model, tiny_tokenizer, 6, 20, seed=3)
    assert ids.shape == (6, 20)
    assert set(ids.flatten().tolist()) <= ordinary
    assert len(set(ids[:, 0].tolist())) > 1
    assert len({tuple(row) for row in ids.tolist()}) == 6
    assert torch.equal(ids, generate_samples(model, tiny_tokenizer, 6, 20, seed=3))
    assert not torch.equal(ids, generate_samples(model, tiny_tokenizer, 6, 20, seed=4))


def test_a_document_keeps_its_start_where_no_position_is_left_for_it(model, tiny_tokenizer):
    ids = generate_samples(model, tiny_tokenizer, 4, model.config.max_position_embeddings, seed=3)
    assert ids.shape == (4, model.config.max_position_embeddings)
    assert (ids[::2, 0] == tiny_tokenizer.bos_token_id).all()
    assert not (ids[1::2, 0] == tiny_tokenizer.bos_token_id).any()  # random starts have nothing before them


def test_what_samples_begin_with(model, tiny_tokenizer):
    """Documents, conversations and uniformly drawn tokens in turn; special tokens in conversations alone."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    opening = tokenizer("<bos>user: ", add_special_tokens=False).input_ids
    assert chat_start(tokenizer) == opening
    ids = generate_samples(model, tokenizer, 12, 200, seed=3, settings=SamplingSettings(batch_size=5))
    documents, conversations, others = ids[::3], ids[1::3], ids[2::3]
    assert all(row[: len(opening)] == opening for row in conversations.tolist())
    ordinary = set(ordinary_tokens(tokenizer).tolist())
    # 200 tokens are more than the model has positions, so that documents keep their start.
    assert set(documents[:, 1:].flatten().tolist()) | set(others.flatten().tolist()) <= ordinary
    # A turn ends with a special token, so conversations may draw them: 780 draws of about 1 in 540 tokens each.
    assert not set(conversations[:, len(opening) :].flatten().tolist()) <= ordinary


def test_random_starts_are_drawn_uniformly(model, tiny_tokenizer):
    """First tokens of 2000 samples: the chi-square statistic over 20 bins of the ordinary tokens."""
    ordinary, count = ordinary_tokens(tiny_tokenizer), 2000
    first = generate_samples(model, tiny_tokenizer, 2 * count, 2, seed=5)[1::2, 0].contiguous()
    bins = torch.searchsorted(ordinary, first) * 20 // len(ordinary)
    sizes = torch.bincount(torch.arange(len(ordinary)) * 20 // len(ordinary), minlength=20).double()
    expected = sizes / len(ordinary) * count
    statistic = ((torch.bincount(bins, minlength=20) - expected).square() / expected).sum().item()
    # 19 degrees of freedom: mean 19, standard deviation sqrt(38); 8 of them is far beyond chance.
    assert statistic < 19 + 8 * math.sqrt(38)


def test_the_cache_changes_nothing(model, tiny_tokenizer):
    """With hardly any temperature sampling is greedy decoding: what the model without a cache prefers."""
    starts = torch.tensor([[5, 6], [7, 8], [9, 9]])
    ids = continue_tokens(model, starts, 16, torch.Generator().manual_seed(0), SamplingSettings(1e-4))
    with torch.no_grad():
        logits = model(ids).logits
    top = logits[:, 1:-1].topk(2)
    # A tie of two logits within float32 rounding could go either way.
    clear = top.values[..., 0] - top.values[..., 1] > 1e-2
    assert clear.float().mean() > 0.5
    assert torch.equal(ids[:, 2:][clear], top.indices[..., 0][clear])


def test_starts_of_different_lengths(model):
    """A start is kept as it is; a row is drawn from where its own ends."""
    starts = torch.tensor([[5, 6, 7], [8, -1, -1], [9, 10, -1]])
    greedy = SamplingSettings(1e-4)
    ids = continue_tokens(model, starts, 8, torch.Generator().manual_seed(0), greedy)
    assert torch.equal(torch.where(starts < 0, starts, ids[:, :3]), starts)
    for row, start in zip(ids, starts, strict=True):
        alone = continue_tokens(model, start[start >= 0][None], 8, torch.Generator(), greedy)
        assert torch.equal(row, alone[0])


def test_sampling_follows_the_probabilities(model):
    """2000 draws of a first token against the softmax: the chi-square statistic over 20 bins."""
    with torch.no_grad():
        probabilities = (model(torch.tensor([[5]])).logits[0, 0].double() / 0.7).softmax(0)
    count = 2000
    generator = torch.Generator().manual_seed(0)
    starts = torch.full((count, 1), 5)
    drawn = continue_tokens(model, starts, 2, generator, SamplingSettings(0.7))[:, 1]
    bins = torch.arange(len(probabilities)) * 20 // len(probabilities)
    expected = torch.zeros(20, dtype=torch.float64).index_add(0, bins, probabilities) * count
    observed = torch.bincount(bins[drawn], minlength=20).double()
    statistic = ((observed - expected).square() / expected).sum().item()
    # 19 degrees of freedom: mean 19, standard deviation sqrt(38); 8 of them is far beyond chance.
    assert statistic < 19 + 8 * math.sqrt(38)


def test_min_p_and_banned_tokens(model):
    with torch.no_grad():
        probabilities = model(torch.tensor([[5]])).logits[0, 0].softmax(0)
    floor = 0.5 * probabilities.max()
    starts = torch.full((500, 1), 5)
    drawn = continue_tokens(model, starts, 2, torch.Generator().manual_seed(0), SamplingSettings(min_p=0.5))
    assert probabilities[drawn[:, 1]].min() >= floor
    banned = torch.zeros(len(probabilities), dtype=torch.bool)
    banned[: len(probabilities) // 2] = True
    drawn = continue_tokens(model, starts, 2, torch.Generator().manual_seed(0), banned=banned)
    assert drawn[:, 1].min() >= len(probabilities) // 2


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"min_p": 1}, {"batch_size": 0}])
def test_bad_settings(bad):
    with pytest.raises(SliceGPTError, match=f"{next(iter(bad))}: must"):
        SamplingSettings(**bad)


# --- coverage ---


def batch(rows, lengths=None):
    ids = torch.tensor(rows)
    lengths = torch.tensor(lengths or [ids.shape[1]] * len(ids))
    return CalibrationBatch(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())


def test_coverage_by_hand():
    # Samples 1 1 2 3 | 1 1 4 and one token of padding: 7 tokens; 2, 3, 4 occur once; 3 and 2 distinct in the halves.
    figures = coverage([batch([[1, 1, 2, 3], [1, 1, 4, 9]], [4, 3])], vocab_size=10, dense_width=2)
    assert figures == {
        "tokens": 7,
        "tokens_per_column": 3.5,
        "distinct_tokens": 4,
        "vocabulary": 0.4,
        "unseen_mass": round(3 / 7, 4),
        "growth": round(math.log2(4 / 2.5), 3),
    }


def test_warnings():
    """Enough open text passes; too little, and text of a closed vocabulary, are each told."""
    generator = torch.Generator().manual_seed(0)
    # Zipf's law over a large vocabulary is open text; the same tokens over a hundred words are not.
    zipf = (1 / torch.arange(1, 50_001).double()).pow(1.3)
    wide = torch.multinomial(zipf, 64 * 1024, replacement=True, generator=generator).view(64, 1024)
    narrow = torch.multinomial(zipf[:100], 64 * 1024, replacement=True, generator=generator).view(64, 1024)

    def warn(ids):
        return calibration_warnings(coverage([CalibrationBatch(ids, torch.ones_like(ids))], 50_000, 576))

    assert warn(wide) == []
    assert [line.split(":")[0] for line in warn(narrow)] == ["the calibration text is narrow"]
    assert "tokens are 7.1 for each column" in warn(wide[:4])[0]
    # A flatter law brings new tokens faster than 21 tokens a column can show them.
    flat = torch.multinomial(zipf.sqrt(), 12 * 1024, replacement=True, generator=generator).view(12, 1024)
    assert "it does not show" in warn(flat)[0]


# --- held-out windows ---


def rows(windows: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in windows.tolist()]


def test_held_out_windows_are_others_of_the_same_text(files, tiny_tokenizer):
    """In the order in which the text's windows are drawn: samples, those that choose λ, those that judge."""
    a = str(files / "a.txt")
    drawn = sample_sources(load_sources(f"{a}:3,random-tokens:1"), tiny_tokenizer, 8, 32)
    plain = windows(sample_batches(load_documents(a), tiny_tokenizer, 13, 32))
    assert rows(drawn.held_out) == plain[6:9]
    assert rows(drawn.unseen) == plain[9:13]
    assert rows(drawn.seen) == plain[:4]
    assert not drawn.unseen_are_held_out
    generated = sample_sources(load_sources("random-tokens"), tiny_tokenizer, 8, 32)
    assert not len(generated.held_out)
    assert not len(generated.unseen)
    assert not generated.unseen_are_held_out


@pytest.mark.parametrize(
    ("spare", "held_out", "unseen"),
    [(0, 0, None), (1, 1, None), (4, 4, None), (5, 4, None), (6, 4, 2), (7, 4, 3), (8, 4, 4), (9, 4, 4)],
)
def test_windows_that_choose_come_before_those_that_judge(documents, tiny_tokenizer, spare, held_out, unseen):
    """A text that ends `spare` windows after its samples. None: too few of its own, so that both are the same."""
    ids = tiny_tokenizer("\n\n".join(documents)).input_ids[: (8 + spare) * 32]
    text = tiny_tokenizer.decode(ids[1:])  # less the BOS that encoding puts before it
    assert tiny_tokenizer(text).input_ids == ids
    drawn = sample_sources([Source("text", documents=[text])], tiny_tokenizer, 8, 32)
    order = windows(sample_batches([text], tiny_tokenizer, 8 + spare, 32))
    assert rows(drawn.held_out) == order[8 : 8 + held_out]
    assert rows(drawn.seen) == order[: held_out if unseen is None else unseen]
    if unseen is None:
        assert rows(drawn.unseen) == rows(drawn.held_out)
    else:
        assert rows(drawn.unseen) == order[8 + held_out : 8 + held_out + unseen]
    assert drawn.unseen_are_held_out == (unseen is None and held_out > 0)


def test_a_model_writes_windows_to_hold_out(tiny_tokenizer, model):
    """`self` alone has them as well; they are no samples of it. It does not write others to judge by."""
    drawn = sample_sources(load_sources("self"), tiny_tokenizer, 4, 16, model=model)
    assert drawn.held_out.shape == (4, 16)
    assert drawn.seen.shape == (4, 16)
    assert torch.equal(drawn.unseen, drawn.held_out)
    assert drawn.unseen_are_held_out
    samples = windows(drawn.batches)
    assert len(samples) == 4
    assert not set(samples) & set(rows(drawn.held_out))


def test_windows_that_judge_are_paired_by_source(files, tiny_tokenizer, model):
    """Of texts alone, as many seen as unseen ones from each; the text that the model writes does not change."""
    a, b = str(files / "a.txt"), str(files / "b,c:2.txt").replace(",", r"\,").replace(":", r"\:")
    drawn = sample_sources(load_sources(f"{a}:1,{b}:1,self:2"), tiny_tokenizer, 8, 16, model=model)
    texts = (load_documents(str(files / name)) for name in ("a.txt", "b,c:2.txt"))
    first, second = (windows(sample_batches(text, tiny_tokenizer, 5, 16)) for text in texts)
    assert rows(drawn.held_out)[:2] == [first[2], second[2]]
    assert rows(drawn.unseen) == [*first[3:5], *second[3:5]]
    assert rows(drawn.seen) == [*first[:2], *second[:2]]
    written = generate_samples(model, tiny_tokenizer, 6, 16)
    assert rows(drawn.held_out)[2:] == rows(written[4:])


def test_few_samples_are_paired_as_well(files, tiny_tokenizer):
    """Fewer samples than windows that judge: as many of these as there are samples."""
    drawn = sample_sources(load_sources(str(files / "a.txt")), tiny_tokenizer, 1, 32)
    assert drawn.held_out.shape == (4, 32)
    assert drawn.unseen.shape == drawn.seen.shape == (1, 32)
    assert not drawn.unseen_are_held_out


def test_a_model_that_is_not_loaded_writes_the_same(files, tiny_tokenizer, model, tmp_path, monkeypatch):
    """It is in memory while it writes and no longer; text and random tokens need only its shape."""
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    source, loaded = open_dense(str(tmp_path)), []
    load = DenseSource.load

    def watched(self):
        whole = load(self)
        loaded.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(DenseSource, "load", watched)
    for spec, count in ((f"{files / 'a.txt'}:1,random-tokens:1", 0), (f"{files / 'a.txt'}:1,self:1", 1)):
        drawn, expected = (
            sample_sources(load_sources(spec), tiny_tokenizer, 4, 16, model=each) for each in (source, model)
        )
        assert calibration_hash(drawn.batches) == calibration_hash(expected.batches)
        assert len(loaded) == count
    gc.collect()
    assert loaded[0]() is None


def test_a_model_that_does_not_fit_writes_nothing(tiny_tokenizer, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    source = open_dense(str(tmp_path))
    monkeypatch.setattr(memory, "free_memory", lambda device: source.total_bytes)
    monkeypatch.setattr(DenseSource, "load", None)
    with pytest.raises(
        SliceGPTError, match="calibration: 'self' is text that the dense model writes"
    ) as error:
        sample_sources(load_sources("self"), tiny_tokenizer, 4, 16, model=source)
    assert str(error.value).endswith("name a text instead")


# --- what does not fit the model ---


def bigger(tokenizer):
    """The tokenizer with two tokens more, one of them in every English text."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([" the", "<tool>"])
    return tokenizer


def test_tokens_beyond_the_table(files, tiny_tokenizer):
    model = tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer))
    tokenizer = bigger(tiny_tokenizer)
    with pytest.raises(SliceGPTError, match=r"token 512, and the model's embedding table 512 rows"):
        sample_sources(load_sources(str(files / "a.txt")), tokenizer, 2, 32, model=model)
    # Text of the model's own making has no such tokens, and so it is as good as any.
    for name in ("self", "random-tokens"):
        drawn = sample_sources(load_sources(name), tokenizer, 64, 16, model=model)
        assert max(int(batch.input_ids.max()) for batch in drawn.batches) < 512


def test_a_table_with_rows_to_spare_is_as_good(files, tiny_tokenizer, model):
    drawn = sample_sources(load_sources(str(files / "a.txt")), bigger(tiny_tokenizer), 2, 32, model=model)
    assert sum(batch.tokens for batch in drawn.batches) == 64


@pytest.mark.parametrize("name", ["a.txt", "self", "random-tokens"])
def test_sequences_beyond_learned_positions(name, files, tiny_tokenizer):
    """64 of them; rotary positions have no end."""
    spec = str(files / name) if name == "a.txt" else name
    for case, length in (("opt", 64), ("opt", 65), ("llama", 65)):
        model = tiny_model(case, torch.float32, vocab_size=len(tiny_tokenizer))
        if (case, length) == ("opt", 65):
            with pytest.raises(SliceGPTError, match="65 tokens is beyond the model's 64 learned positions"):
                sample_sources(load_sources(spec), tiny_tokenizer, 1, length, model=model)
        else:
            drawn = sample_sources(load_sources(spec), tiny_tokenizer, 1, length, model=model)
            assert drawn.batches[0].input_ids.shape == (1, length)


@pytest.mark.parametrize("varied", [False, True])
def test_half_of_a_surrogate_pair(varied, tiny_tokenizer):
    with pytest.raises(
        SliceGPTError, match=r"the text is not Unicode text: half of a surrogate pair \(\\ud800\)"
    ):
        sample_batches(["some text \ud800 and more"], tiny_tokenizer, 1, 2, varied_seqlen=varied)
