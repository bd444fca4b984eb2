"""Documents, token ids and calibration samples."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slicegpt.calibration import calibration_hash, encode_text, load_documents, sample_batches, tokens
from slicegpt.calibration.sources import HUB_DATASETS
from slicegpt.errors import SliceGPTError

# --- documents from files ---


def test_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n\r\nsecond paragraph\n")
    assert load_documents(str(file)) == ["naïve\n\nsecond paragraph\n"]


def test_folder_is_a_document_per_text_file(tmp_path):
    for name, text in {"b.txt": "second", "a.txt": "first", "c.txt": " \n", "notes.md": "not taken"}.items():
        (tmp_path / name).write_text(text)
    assert load_documents(str(tmp_path)) == ["first", "second"]
    assert load_documents(str(tmp_path), "test") == ["first", "second", " \n"]


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [
        {"text": "one\u2028line", "body": "uno"},
        {"text": "", "body": "due"},
        {"text": "three", "body": "tre"},
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert load_documents(str(file)) == ["one\u2028line", "three"]
    assert load_documents(str(file), "test") == ["one\u2028line", "", "three"]
    assert load_documents(str(file), text_column="body") == ["uno", "due", "tre"]


def write_parquet(file, columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table(columns), file)
    return str(file)


def test_parquet(tmp_path):
    spec = write_parquet(
        tmp_path / "a.parquet", {"text": ["one", "", "three"], "body": ["uno", "due", "tre"]}
    )
    assert load_documents(spec) == ["one", "three"]
    assert load_documents(spec, "test") == ["one", "", "three"]
    assert load_documents(spec, text_column="body") == ["uno", "due", "tre"]


BAD_FILES = {
    "empty": ("a.txt", b"", "holds no text"),
    "blank": ("a.txt", b" \n\n", "holds no text"),
    "binary": ("a.txt", b"PNG\x00\x01", r"is not text \(a zero byte at 3\)"),
    "utf-16": ("a.txt", "hello".encode("utf-16"), r"is not UTF-8 text \(byte 0 is 0xff\)"),
    "latin-1": ("a.txt", "naïve".encode("latin-1"), r"is not UTF-8 text \(byte 2 is 0xef\)"),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON: Expecting"),
    "not an object": ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', "line 3 must be a JSON object, got list"),
    "missing key": ("a.jsonl", b'{"body": "a", "id": 1}\n', "line 1 has no column 'text'; it has: body, id"),
    "not a string": ("a.jsonl", b'{"text": 7}\n', "line 1: column 'text' must be text, got int"),
    "json": ("a.json", b'[{"text": "a"}]', r"expected \.jsonl, one JSON object a line, got \.json"),
    "not parquet": ("a.parquet", b"text", "cannot read .*parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_told_in_one_line(case, tmp_path):
    name, content, message = BAD_FILES[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SliceGPTError, match=message) as error:
        load_documents(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, "has no column 'text'; it has: body, id"),
        ({"text": [1, 2]}, "column 'text' must be text, got int64"),
        ({"text": ["a", None]}, "column 'text' has no text in row 1"),
    ],
)
def test_bad_parquet_column(columns, message, tmp_path):
    with pytest.raises(SliceGPTError, match=message):
        load_documents(write_parquet(tmp_path / "a.parquet", columns))


def test_what_names_nothing(tmp_path):
    with pytest.raises(
        SliceGPTError, match=r"is no file or folder, .*python-reference, wikitext2, ptb, c4, alpaca"
    ):
        load_documents(str(tmp_path / "absent.txt"))
    with pytest.raises(SliceGPTError, match=r"has no \.txt files"):
        load_documents(str(tmp_path))
    with pytest.raises(SliceGPTError, match="the name of the text is empty"):
        load_documents("")
    with pytest.raises(SliceGPTError, match="split must be 'train' or 'test', got 'validation'"):
        load_documents("python-reference", "validation")
    with pytest.raises(SliceGPTError, match="python-reference has no columns: text_column='body'"):
        load_documents("python-reference", text_column="body")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("pyarrow", "datasets") else find_spec(name)
    )
    (tmp_path / "a.parquet").touch()
    with pytest.raises(SliceGPTError, match=r"needs pyarrow: pip install 'slicegpt\[parquet\]'"):
        load_documents(str(tmp_path / "a.parquet"))
    with pytest.raises(SliceGPTError, match=r"wikitext2 needs datasets: pip install 'slicegpt\[hub\]'"):
        load_documents("wikitext2")


# --- documents from Python and from the hub ---


def test_python_reference_splits_share_no_paragraph():
    from pydoc_data.topics import topics

    train, test = load_documents("python-reference"), load_documents("python-reference", "test")
    assert sorted(train + test) == sorted(topics.values())
    paragraphs = [
        {" ".join(part.split()) for text in split for part in text.split("\n\n") if len(part) > 80}
        for split in (train, test)
    ]
    assert not paragraphs[0] & paragraphs[1]
    # The demo calibrates on 128 * 512 tokens of 4 characters, and measures on 32 * 512.
    assert sum(map(len, train)) > 300_000
    assert sum(map(len, test)) > 70_000


class Rows:
    """What we use of `datasets.Dataset`, over a dictionary of columns."""

    def __init__(self, columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column):
        return self.columns[column]

    def select(self, indices):
        return Rows({name: [column[i] for i in indices] for name, column in self.columns.items()})

    def shuffle(self, seed):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.select(order)

    def train_test_split(self, test_size, seed):
        rows, cut = self.shuffle(seed), round(len(self) * (1 - test_size))
        return {"train": rows.select(range(cut)), "test": rows.select(range(cut, len(self)))}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` package; returns the list of calls and takes the rows to hand out."""

    class Hub:
        calls: list = []  # noqa: RUF012
        rows = Rows({"text": ["a"]})

    def load_dataset(path, **options):
        Hub.calls.append((path, {name: value for name, value in options.items() if value is not None}))
        if isinstance(Hub.rows, Exception):
            raise Hub.rows
        return Hub.rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = importlib.util.spec_from_loader("datasets", loader=None)
    monkeypatch.setitem(sys.modules, "datasets", module)
    Hub.calls.clear()
    return Hub


PUBLISHED = {
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, "text", "test"),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        {"name": "penn_treebank", "revision": "refs/convert/parquet"},
        "sentence",
        "test",
    ),
    "c4": (
        "allenai/c4",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
        "text",
        "validation",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hub_dataset_as_published(name, hub):
    path, options, column, test_split = PUBLISHED[name]
    hub.rows = Rows({"id": [1, 2, 3], column: ["", " = Title = \n", "text"]})
    assert load_documents(name) == [" = Title = \n", "text"]
    assert load_documents(name, "test") == ["", " = Title = \n", "text"]
    assert hub.calls == [(path, {**options, "split": "train"}), (path, {**options, "split": test_split})]


def test_c4_is_drawn_from(hub):
    hub.rows = Rows({"text": [f"document {i}" for i in range(6000)]})
    train, test = load_documents("c4"), load_documents("c4", "test")
    assert (len(set(train)), len(set(test))) == (5000, 500)
    assert train == load_documents("c4")
    assert train != sorted(train)


def test_alpaca_is_split_in_80_10_10(hub):
    hub.rows = Rows({"instruction": ["x"] * 100, "text": [f"document {i}" for i in range(100)]})
    train, test = load_documents("alpaca"), load_documents("alpaca", "test")
    assert (len(train), len(test)) == (80, 10)
    assert not set(train) & set(test)
    assert hub.calls[0] == ("tatsu-lab/alpaca", {"split": "train"})


def test_hub_out_of_reach(hub):
    hub.rows = ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub\nlong explanation")
    with pytest.raises(
        SliceGPTError, match=r"did not give wikitext2 \(Salesforce/wikitext\): Couldn't reach"
    ) as error:
        load_documents("wikitext2")
    assert "\n" not in str(error.value)


def test_hub_dataset_that_changed_its_columns(hub):
    hub.rows = Rows({"page": ["a"]})
    with pytest.raises(SliceGPTError, match="wikitext2 has no column 'text'; it has: page"):
        load_documents("wikitext2")


@pytest.mark.parametrize("name", HUB_DATASETS)
def test_real_datasets_package(name, tmp_path, monkeypatch):
    """The same calls on the real package, with the hub replaced by a local file of the same columns."""
    datasets = pytest.importorskip("datasets")
    column = HUB_DATASETS[name].column
    rows = datasets.Dataset.from_dict({"id": list(range(20)), column: [f"document {i}" for i in range(20)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    documents = load_documents(name)
    assert set(documents) <= set(rows[column])
    assert len(set(documents)) == (16 if name == "alpaca" else 20)


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
    with pytest.raises(SliceGPTError, match=f"sample_batches: {argument} must be at least 1, got 0"):
        sample_batches(documents, tiny_tokenizer, **{argument: 0})
