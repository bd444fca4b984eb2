"""`bench.commands.bench_sizes`: a dense model and its slices in one table."""

import json
import sys

from support.saved_models import save_dense

from slicegpt import api
from slicegpt.bench.commands import bench_sizes
from slicegpt.conversion.size_plan import plan_recipe
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import stored_parameters
from slicegpt.recipe import Recipe


def test_dense_and_sliced_rows(tiny_tokenizer, tmp_path, monkeypatch, documents, capsys):
    folder = save_dense(tmp_path / "model", tiny_tokenizer)
    text, file = tmp_path / "text.txt", tmp_path / "sizes.json"
    text.write_text(documents[0], encoding="utf-8")
    arguments = [
        "--sizes",
        "0.9",
        "--calibration",
        str(text),
        "--nsamples",
        "4",
        "--seqlen",
        "32",
        "--data",
        str(text),
    ]
    arguments += [
        "--eval-seqlen",
        "32",
        "--windows",
        "2",
        "--tokens",
        "3",
        "--turns",
        "1",
        "--json",
        str(file),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_sizes", str(folder), *arguments])
    bench_sizes.main()
    content = json.loads(file.read_text())
    dense, small = content["rows"]
    model, _ = api.load(str(folder), "float32")
    planned = plan_recipe(Recipe(keep=0.9, round_to=8), canonical_fields(model), model.dtype)
    assert dense["bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    # Neurons are shared out anew in multiples of 8: at most as many numbers as planned.
    assert 0.8 * dense["bytes"] < small["bytes"] <= 4 * stored_parameters(planned)
    assert small["width"] == planned.boundary_widths[0]
    for row in (dense, small):
        assert row["perplexity"] > 1
        assert row["tokens_per_second_float32"] > 0
        assert row["tokens_per_second_bfloat16"] > 0
    assert content["settings"]["sizes"] == "0.9"
    assert "tokens/s float32" in capsys.readouterr().out
