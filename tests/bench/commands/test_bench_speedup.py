"""Plans by measured times, and how fast networks of them decode: what is written, not how fast it is."""

import json

import pytest

from slicegpt.bench.commands import bench_speedup
from slicegpt.bench.models.architectures import fields_of
from slicegpt.step_times import StepTimes


def test_a_row_for_every_plan(tmp_path, monkeypatch):
    small = fields_of("smollm2-135m") | {"num_hidden_layers": 2, "vocab_size": 64}
    times = StepTimes(1e-4, 1e-5, 4e-10, 5e-10, 6e-10)
    monkeypatch.setattr(bench_speedup, "fields_of", lambda shape: small)
    monkeypatch.setattr(bench_speedup, "measure_step_times", lambda *_: times)
    file = tmp_path / "speedup.json"
    options = [
        "--speedups",
        "1.2,1.4",
        "--dtypes",
        "float32",
        "--tokens",
        "2",
        "--turns",
        "1",
        "--device",
        "cpu",
    ]
    bench_speedup.main([*options, "--json", str(file)])
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["step_times"] == {"float32": str(times)}
    assert [row["asked"] for row in content["rows"]] == [1.2, 1.2, 1.4, 1.4]
    for row in content["rows"]:
        assert row["asked"] <= row["planned"] < 1.05 * row["asked"]
        assert row["measured"] == pytest.approx(row["sliced tokens/s"] / row["dense tokens/s"])
        assert row["columns"] <= 576
