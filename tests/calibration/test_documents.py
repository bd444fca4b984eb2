"""Documents from files, from Python and from the hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import sys
import types

import pytest
import torch

from slicegpt.calibration import has_columns, load_documents
from slicegpt.calibration.documents import HUB_DATASETS
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


ROWS = [
    {"text": 'one,\n"line"', "body": "uno"},
    {"text": "", "body": "due"},
    {"text": "three", "body": "tre"},
]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
FORMATS = {
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES,
    "a.csv": b'text,body\r\n"one,\n""line""",uno\r\n,due\r\nthree,tre\r\n',
    "a.TSV": b'body\ttext\nuno\t"one,\n""line"""\ndue\t\ntre\tthree\n',
    "a.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
    "a.jsonl.BZ2": bz2.compress(LINES),
    "a.json.xz": lzma.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_in_every_format(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name])
    assert has_columns(name)
    assert load_documents(str(tmp_path / name)) == ['one,\n"line"', "three"]
    assert load_documents(str(tmp_path / name), text_column="body") == ["uno", "due", "tre"]


@pytest.mark.parametrize("name", ["a.json", "lines.json", "a.csv", "a.jsonl.gz"])
def test_rows_are_those_that_datasets_reads(name, tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = "csv" if name.endswith("csv") else "json"
    (tmp_path / name).write_bytes(FORMATS[name])
    options = {"cache_dir": str(tmp_path / "cache"), "split": "train"}
    if kind == "csv":
        options["keep_default_na"] = False
    rows = datasets.load_dataset(kind, data_files=str(tmp_path / name), **options)
    assert load_documents(str(tmp_path / name), "test") == list(rows["text"])


def test_text_may_be_compressed(tmp_path):
    for name, pack in {"a.txt.gz": gzip.compress, "b.XZ": lzma.compress, "c.md.bz2": bz2.compress}.items():
        (tmp_path / name).write_bytes(pack("naïve\r\n".encode()))
        assert load_documents(str(tmp_path / name)) == ["naïve\n"]


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:]))
    assert load_documents(str(file)) == ['one,\n"line"', "three"]
    file.write_bytes(zstandard.compress(LINES)[:-9])
    with pytest.raises(SliceGPTError, match=r"is not a whole \.zst file: it ends within a frame"):
        load_documents(str(file))


def test_long_documents_in_a_table(tmp_path):
    """Longer than the csv module's own limit, which stays what it was."""
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert load_documents(str(tmp_path / "a.csv")) == ["x" * 200_000]
    assert csv.field_size_limit() == limit


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
    "json number": ("a.json", b"7", "must hold an array of JSON objects, or one object a line, got int"),
    "json row": ("a.json", b'[{"text": "a"}, "b"]', "row 2 must be a JSON object, got str"),
    "upper case": ("a.JSONL", b'{"text": "a"}\n7\n', "line 2 must be a JSON object, got int"),
    "ndjson": ("a.ndjson", b'{"body": "a"}\n', "line 1 has no column 'text'; it has: body"),
    "csv column": ("a.csv", b"id,body\n1,a\n", "has no column 'text'; it has: id, body"),
    "csv row": ("a.csv", b"id,text\n1,a\n2\n", "row 2: column 'text' is missing"),
    "csv quotes": ("a.csv", b'id,text\n1,"a', "is not readable: unexpected end of data"),
    "json in csv": ("a.csv", b'{"text": "a"}\n', "has no column 'text'"),
    "deep": ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
    "surrogate": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b\\ud800c"}\n',
        r"line 2: column 'text' is not Unicode text: half of a surrogate pair \(\\ud800\) at character 1",
    ),
    "not gzip": ("a.txt.gz", b"text", r"is not a whole \.gz file: Not a gzipped file"),
    "half of gzip": ("a.txt.gz", gzip.compress(b"text" * 99)[:20], r"is not a whole \.gz file"),
    "not xz": ("a.jsonl.xz", b"text", r"is not a whole \.xz file"),
    "not bzip2": ("a.jsonl.bz2", b"text", r"is not a whole \.bz2 file"),
    "zipped binary": ("a.gz", gzip.compress(b"\0"), "is not text"),
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
    with pytest.raises(SliceGPTError, match="spec: must name a text, got an empty name"):
        load_documents("")
    with pytest.raises(SliceGPTError, match="split: must be 'train' or 'test', got 'validation'"):
        load_documents("python-reference", "validation")
    with pytest.raises(SliceGPTError, match="python-reference has no columns: text_column='body'"):
        load_documents("python-reference", text_column="body")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("pyarrow", "datasets", "zstandard") else find_spec(name),
    )
    (tmp_path / "a.parquet").touch()
    with pytest.raises(SliceGPTError, match=r"needs pyarrow: pip install 'slicegpt\[parquet\]'"):
        load_documents(str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt.zst").touch()
    with pytest.raises(SliceGPTError, match="needs zstandard: pip install zstandard"):
        load_documents(str(tmp_path / "a.txt.zst"))
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
