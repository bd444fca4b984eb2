"""`slicegpt slice --dry-run`: plans of shapes and of folders, whose weights are not read."""

import json
import re

import pytest
from support.command_line import bad
from support.saved_models import save_dense

from slicegpt.cli import main

SMALL = ["--device-memory", "20GB", "--host-memory", "32GB", "--gpu", "rtx-4090"]


def test_a_shape_without_a_checkpoint(tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(["slice", "llama-2-70b", "--params", "0.8", "--dry-run", *SMALL, "--json", str(file)])
    printed, plan = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert plan["size"]["dense_parameters"] == 68_976_648_192
    assert 0.79 < plan["size"]["parameters"] / plan["size"]["dense_parameters"] <= 0.8
    assert plan["size"]["bytes"] == 2 * plan["size"]["parameters"]
    assert (plan["activation_storage"], plan["fits"], plan["advice"]) == ("host", True, None)
    assert plan["machine"] == {"device": 20e9, "host": 32e9, "disk": plan["machine"]["disk"], "ranks": 1}
    assert plan["peak"]["device"] <= 20e9
    assert plan["rates"]["source"] == "RTX 4090's data sheet, at 60 % of its peaks"
    for text in (
        "55,181,312,000 of 68,976,648,192 dense",
        "system or its inverse",
        "The run fits.",
        "An estimate: rates",
    ):
        assert text in printed


def test_a_plan_that_does_not_fit_says_what_would(capsys):
    main(["slice", "llama-2-70b", "--params", "0.8", "--dry-run", *SMALL, "--activation-storage", "device"])
    printed = capsys.readouterr().out
    assert "The run does not fit: --activation-storage host would make it fit." in printed


def test_a_folder_of_which_only_the_config_is_there(tmp_path, capsys, tiny_tokenizer):
    """On this machine, whose rates are measured; the weights may be gone."""
    dense = save_dense(tmp_path / "dense", tiny_tokenizer)
    for file in dense.glob("*.safetensors"):
        file.unlink()
    file = tmp_path / "plan.json"
    main(
        [
            "slice",
            str(dense),
            "--slice",
            "0.25",
            "--round-to",
            "4",
            "--kv-groups",
            "2,0,1",
            "--dry-run",
            "--device",
            "cpu",
            "--json",
            str(file),
        ]
    )
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert plan["fits"]
    assert set(plan["widths"][:-1]) == {36}
    assert plan["key_value_heads"] == plan["recipe"]["kv_groups"] == [2, 0, 1]
    assert plan["recipe"]["dtype"] == "float32"
    assert plan["rates"]["source"] == "measured on cpu in less than a second"
    assert sum(plan["seconds"].values()) > 0
    printed = capsys.readouterr().out
    assert "measured on cpu" in printed
    assert "3 in all, 0 to 2 a layer" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h200", "--output", "x"], "--gpu: is for --dry-run, which is not given"),
        (["--ranks", "8", "--output", "x"], "--ranks: is for --dry-run, which is not given"),
        ([], "--output: a folder to write is needed, got none"),
        (["--gpu", "h300", "--dry-run"], "--gpu: must be one of b200, h200, .*, got 'h300'"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    assert re.search(message, bad(capsys, "slice", "llama-2-70b", "--params", "0.8", *options))
