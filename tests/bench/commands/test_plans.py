"""The comparison of plans, of a tiny model."""

import json
import sys

from support.saved_models import save_dense, save_text

from slicegpt.bench.commands import bench_plans


def test_every_plan_is_measured(tiny_tokenizer, documents, tmp_path, monkeypatch, capsys):
    folder = save_dense(tmp_path / "dense", tiny_tokenizer)
    text = save_text(tmp_path / "train.txt", documents)
    file = tmp_path / "plans.json"
    options = [
        "--calibration",
        str(text),
        "--sizes",
        "0.7",
        "--nsamples",
        "8",
        "--seqlen",
        "32",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_plans", str(folder), *options, "--json", str(file)])
    bench_plans.main()
    content = json.loads(file.read_text())
    names = [row["plan"] for row in content["rows"]]
    assert set(names) == {
        "exchange",
        "neurons, priced",
        "neurons, by the objective",
        "columns and neurons in step",
        "columns",
    }
    for row in content["rows"]:
        assert row["measured"] > 0
        assert 0.5 < row["kept"] <= 0.7
        assert len(row["layers"]["neurons"]) == 3
    assert [sorted(layer) for layer in content["prices"]["groups"]] == [["0", "1"]] * 3
    assert "in step" in capsys.readouterr().out
