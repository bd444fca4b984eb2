"""Aligned tables and atomic JSON files."""

from __future__ import annotations

import json
import os

import pytest

from slicegpt.errors import SliceGPTError
from slicegpt.table import format_table, write_json


def test_columns_are_aligned():
    rows = [
        {"model": "dense", "perplexity": 13.8765, "parameters": 134515008, "slicing": "0 %"},
        {"model": "sliced", "perplexity": 1234567.8, "parameters": 9, "slicing": None},
    ]
    assert format_table(rows, ["model", "perplexity", "parameters", "slicing"]).splitlines() == [
        "model   perplexity   parameters  slicing",
        "------  ----------  -----------  -------",
        "dense        13.88  134,515,008      0 %",
        "sliced   1,234,568            9        -",
    ]


def test_no_rows_is_a_header():
    assert format_table([], ["a", "bc"]).splitlines() == ["a  bc", "-  --"]


def test_json_replaces_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    write_json(file, {"perplexity": 1.5})
    write_json(file, {"perplexity": 2.5, "tokens": 3})
    assert json.loads(file.read_text()) == {"perplexity": 2.5, "tokens": 3}
    assert os.listdir(tmp_path) == ["result.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SliceGPTError, match=r"cannot write .*result\.json: No space left on device"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_has_no_infinity(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "result.json", {"perplexity": float("inf")})
    assert os.listdir(tmp_path) == []


def test_missing_folder(tmp_path):
    with pytest.raises(SliceGPTError, match=r"cannot write .*: No such file or directory"):
        write_json(tmp_path / "none" / "result.json", {})
