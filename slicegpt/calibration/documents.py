"""Documents from files, from published datasets, and from Python's own language reference."""

from __future__ import annotations

import collections
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slicegpt.calibration.files import has_columns, missing_column, need, read_file, read_text
from slicegpt.errors import SliceGPTError, first_line

Split = Literal["train", "test"]


def load_documents(spec: str, split: Split = "train", text_column: str | None = None) -> list[str]:
    """Load the documents that `spec` names.

    Args:
        spec: a built-in name (`python-reference`; from the Hugging Face hub `wikitext2`, `ptb`, `c4`,
            `alpaca`), or a path: a `.jsonl` (or `.ndjson`), `.json`, `.csv`, `.tsv` or `.parquet` file (a document a
            row), a folder (a document a `.txt` file, by name), or any other file, taken as UTF-8 text and one document.
            Files may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`); upper case is the same as lower case.
        split: which part of a built-in text. Files are taken whole. Documents without text are dropped for
            "train", where they would be samples of nothing, and kept for "test": the published perplexities
            of WikiText-2 join its many empty lines too.
        text_column: the column that holds the text of a file with columns, "text" by default.

    Raises:
        SliceGPTError: one line naming the file, and the line or column at fault.
    """
    if split not in ("train", "test"):
        raise SliceGPTError(f"must be 'train' or 'test', got {split!r}", "split")
    check_documents(spec, text_column)
    column = text_column or "text"
    if spec == "python-reference":
        documents = _python_reference(split)
    elif spec in HUB_DATASETS:
        documents = _read_hub(spec, split)
    elif Path(spec).is_dir():
        documents = _read_folder(Path(spec))
    else:
        documents = read_file(Path(spec), column)
    with_text = [document for document in documents if document.strip()]
    if not with_text:
        raise SliceGPTError(f"{spec} holds no text", "spec")
    return with_text if split == "train" else documents


def check_documents(spec: str, text_column: str | None = None, argument: str = "spec") -> None:
    """Refuse what `load_documents` could not read, as far as a name tells; nothing is read.

    Args:
        spec, text_column: as for `load_documents`.
        argument: what the caller calls `spec`.

    Raises:
        SliceGPTError: no name, no such text, or a column of what has none.
    """
    if not spec:
        raise SliceGPTError("must name a text, got an empty name", argument)
    if text_column is not None and not has_columns(spec):
        raise SliceGPTError(
            f"{spec} has no columns: text_column={text_column!r} does not apply", "text_column"
        )
    if spec != "python-reference" and spec not in HUB_DATASETS and not Path(spec).exists():
        names = ", ".join(["python-reference", *HUB_DATASETS])
        raise SliceGPTError(
            f"{spec} is no file or folder, and none of the built-in texts ({names})", argument
        )


def _read_folder(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SliceGPTError(f"the folder {folder} has no .txt files", "spec")
    return [read_text(file) for file in files]


def _python_reference(split: Split) -> list[str]:
    """Return topics of Python's language reference (PSF licence), which every CPython carries.

    A third of the topics, chosen by a hash of their names, is the test split. Topics that share a paragraph
    with another one (a fifth of the text is there twice) are all for training, so that no test paragraph is
    trained on.
    """
    from pydoc_data.topics import topics

    paragraphs = {
        name: {" ".join(part.split()) for part in text.split("\n\n") if len(part) > 80}
        for name, text in topics.items()
    }
    uses = collections.Counter(part for parts in paragraphs.values() for part in parts)

    def held_out(name: str) -> bool:
        drawn = hashlib.sha256(name.encode()).digest()[0] % 3 == 0
        return drawn and all(uses[part] == 1 for part in paragraphs[name])

    return [topics[name] for name in sorted(topics) if held_out(name) == (split == "test")]


@dataclass(frozen=True)
class HubDataset:
    """A published dataset as SliceGPT's experiments use it (arXiv 2401.15024, section 4).

    Attributes:
        path, name, revision, data_files: what `datasets.load_dataset` is given.
        column: the column that holds the text.
        splits: the dataset's own names of our splits.
        draw: documents drawn at random per split, where the published code does not take all.
    """

    path: str
    column: str
    splits: dict[Split, str]
    name: str | None = None
    revision: str | None = None
    data_files: dict[str, str] | None = None
    draw: dict[Split, int] | None = None


HUB_DATASETS = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext", "text", {"train": "train", "test": "test"}, name="wikitext-2-raw-v1"
    ),
    # The repository holds a script, which `datasets` no longer runs; the hub keeps its output as Parquet.
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only",
        "sentence",
        {"train": "train", "test": "test"},
        name="penn_treebank",
        revision="refs/convert/parquet",
    ),
    "c4": HubDataset(
        "allenai/c4",
        "text",
        {"train": "train", "test": "validation"},
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        draw={"train": 5000, "test": 500},
    ),
    "alpaca": HubDataset("tatsu-lab/alpaca", "text", {"train": "train", "test": "train"}),
}


def _read_hub(spec: str, split: Split) -> list[str]:
    need("datasets", "'slicegpt[hub]'", f"the dataset {spec}")
    import datasets

    source = HUB_DATASETS[spec]
    try:
        rows = datasets.load_dataset(
            source.path,
            name=source.name,
            revision=source.revision,
            data_files=source.data_files,
            split=source.splits[split],
        )
    except Exception as error:  # the network stack raises whatever its HTTP library raises
        raise SliceGPTError(
            f"the Hugging Face hub did not give {spec} ({source.path}): {first_line(error)};"
            " a local .txt, .jsonl or .parquet file works offline",
            "spec",
        ) from error
    if spec == "alpaca":
        rows = _alpaca_split(rows, split)
    if source.draw and source.draw[split] < len(rows):
        rows = rows.shuffle(seed=42).select(range(source.draw[split]))
    if source.column not in rows.column_names:
        raise missing_column(spec, source.column, rows.column_names)
    return list(rows[source.column])


def _alpaca_split(rows: Any, split: Split) -> Any:
    """Split Alpaca, which comes in one piece: 80 % to train, half of the rest to test, half unused."""
    parts = rows.train_test_split(test_size=0.2, seed=42)
    if split == "train":
        return parts["train"]
    return parts["test"].train_test_split(test_size=0.5, seed=42)["train"]
