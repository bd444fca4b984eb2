"""The benchmark of `decode_attention_`: every case in its table and its file, the environment as it was."""

import json
import os
import sys

from slicegpt.bench.kernels import bench_attention


def test_rows(monkeypatch, tmp_path, capsys):
    file = tmp_path / "attention.json"
    arguments = ["--models", "phi-2", "gemma-2b", "--batch", "1", "2", "--tokens", "8", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_attention", *arguments, "--json", str(file)])
    monkeypatch.setattr(bench_attention, "ON_GPU", False)
    monkeypatch.setenv("SLICEGPT_BACKEND", "auto")
    bench_attention.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["batch"], row["tokens"], row["by"]) for row in rows] == [
        (model, batch, 8, "reference") for model in ("phi-2", "gemma-2b") for batch in (1, 2)
    ]
    for row, key_heads, size in zip(rows, (32, 32, 1, 1), (80, 80, 256, 256), strict=True):
        read = 2 * row["batch"] * key_heads * 8 * size * 4
        assert abs(row["GB/s"] * row["µs a layer"] * 1e3 / read - 1) < 1e-9
    assert "µs a layer" in capsys.readouterr().out
    assert os.environ["SLICEGPT_BACKEND"] == "auto"
