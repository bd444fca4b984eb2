"""What a run says at its end: sizes asked for and got, perplexities, tokens/s; and why where there are none."""

import json
import math

import pytest
import torch
from support.saved_models import save_dense, save_text
from support.tiny_models import tiny_model

from slicegpt import api
from slicegpt.calibration import load_sources, sample_sources
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.outcome import asked_and_got, asked_record, notes, outcome_rows, perplexity_record
from slicegpt.cli import main
from slicegpt.errors import SliceGPTError
from slicegpt.recipe import Recipe
from slicegpt.runtime import speed

SMALL = {"round_to": 4, "nsamples": 8, "seqlen": 32, "device": "cpu"}
pytestmark = pytest.mark.filterwarnings("ignore:the calibration text is small")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "train.txt", documents)


@pytest.fixture(scope="module")
def result(folder, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("sliced") / "a folder"
    return api.slice(folder, keep=0.9, calibration=text, output=output, **SMALL), output


def test_perplexities_are_the_models_own_on_unseen_windows(result, folder, text):
    """Against Hugging Face's loss on the same windows, in float32 sums."""
    sliced, _ = result
    dense, tokenizer = load_dense(str(folder))
    unseen = sample_sources(load_sources(str(text)), tokenizer, 8, 32).unseen
    for name, model in (("dense", dense), ("sliced", sliced.model)):
        with torch.no_grad():
            expected = math.exp(model(unseen, labels=unseen).loss.item())
        # Losses are recorded to 1e-5 nats; float32 sums of some hundred terms err by as much.
        assert sliced.report.record["perplexity"][name] == pytest.approx(expected, rel=1e-4)


def test_everything_is_in_the_record_the_card_info_and_the_report(result, capsys, tmp_path):
    sliced, output = result
    record = json.loads((output / "slicing.json").read_text())
    assert record["asked"] == {"keep": 0.9}
    assert record["perplexity"] == sliced.report.record["perplexity"]
    rates = record["tokens_per_second"]
    assert rates["dense"] > 0
    assert rates["sliced"] > 0
    assert rates["device"] == "cpu"
    card = (output / "README.md").read_text()
    shown = str(sliced.report)
    assert main(["info", str(output), "--json", str(tmp_path / "info.json")]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "info.json").read_text())
    got = f"got {100 * record['size']['parameters'] / record['size']['dense_parameters']:.1f} %"
    for words in (card, shown, printed):
        assert f"asked 90.0 % of the parameters, {got}" in words
        for name in ("dense", "sliced"):
            assert f"{record['perplexity'][name]:.4g}" in words
            assert f"{rates[name]:.4g}" in words
    assert facts["perplexity"] == record["perplexity"]
    assert facts["tokens_per_second"] == rates
    assert shown.splitlines()[-2] == f"saved: {output}"
    assert shown.splitlines()[-1].startswith(f"next: slicegpt generate '{output}' --prompt ")
    assert max(map(len, shown.splitlines()[:9])) <= 80


def test_the_next_command_parses(result):
    import shlex

    from slicegpt.cli import build_parser

    sliced, output = result
    words = shlex.split(str(sliced.report).splitlines()[-1].removeprefix("next: "))
    assert build_parser().parse_args(words[1:]).model == str(output)


def test_what_is_not_wanted_is_not_measured(folder, text):
    report = api.slice(folder, keep=0.9, calibration=text, timing=False, held_out=False, **SMALL).report
    assert report.record["perplexity"] is None
    assert report.record["tokens_per_second"] is None
    shown = str(report)
    assert shown.count("not measured") == 4
    assert "saved" not in shown


RECORD = {
    "dtype": "float16",
    "slicing": 0.208,
    "size": {
        "parameters": 89,
        "dense_parameters": 100,
        "bytes": 178e6,
        "dense_bytes": 200e6,
        "removed": 0.11,
    },
}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(keep=0.9), "asked 90.0 % of the parameters, got 89.0 %"),
        (Recipe(target_bytes="180MB"), "asked 180.0 MB, got 178.0 MB"),
        (Recipe(slice=0.2), "asked to delete 20.0 % of the columns, deleted 20.8 %"),
        (Recipe(widths=[40]), None),
    ],
)
def test_asked_and_got(recipe, expected):
    assert asked_and_got(RECORD | {"asked": asked_record(recipe)}) == expected


def test_a_record_of_an_older_run():
    """Without what this version adds."""
    assert asked_and_got(RECORD) is None
    assert [row["sliced"] for row in outcome_rows(RECORD)][2:] == ["not measured"] * 2
    assert len(notes(RECORD)) == 1


def test_notes():
    speed_record = {
        "dense": None,
        "sliced": 3.0,
        "device": "cuda",
        "note": "the dense model was not at hand",
    }
    check = {"dense_nll": 1.0, "sliced_nll": 800.0, "tokens": 10, "chose_ridge": True}
    more = {"perplexity": perplexity_record(check), "tokens_per_second": speed_record, "finetuning": {}}
    told = notes(RECORD | more)
    assert "which chose the refit's λ as well; before fine-tuning" in told[0]
    assert told[1] == "tokens/s: of the runtime, one sequence, float16 (the dense model was not at hand)"
    rows = outcome_rows(RECORD | more)
    assert (rows[2]["dense"], rows[2]["sliced"], rows[2]["change"]) == ("2.718", "not measured", "")
    assert (rows[3][""], rows[3]["dense"], rows[3]["sliced"]) == ("tokens/s, cuda", "not measured", "3")


# --- tokens/s ---


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", torch.float32)


class Silent:
    @staticmethod
    def step(name):
        from contextlib import nullcontext

        return nullcontext()


def compare(dense, sliced):
    return speed.compare_speed(dense, sliced, torch.arange(24), torch.device("cpu"), Silent())


def test_rates_are_tokens_over_seconds(model, monkeypatch):
    """With a clock of our own: a turn of 16 tokens takes 0.5 s of it."""
    ticks = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: 0.5 * next(ticks))
    assert speed.tokens_per_second([model, model], torch.arange(16)[None], 16, 3) == [32.0, 32.0]


def test_turns_end_with_the_time(model, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    speed.tokens_per_second([model], torch.arange(16)[None], 4, 50, seconds=3.0)
    assert next(ticks) == 2 * (1 + 3)  # a turn to warm up, and three of a second each


def test_a_dense_model_that_is_not_there(model):
    found = compare(None, model)
    assert found["dense"] is None
    assert found["sliced"] > 0
    assert found["note"] == "the dense model was not at hand"


def test_models_that_are_too_large(model, monkeypatch):
    monkeypatch.setattr(speed, "CPU_PARAMETERS", 10)
    assert "too large for a few seconds on a CPU" in compare(model, model)["note"]
    monkeypatch.undo()
    monkeypatch.setattr(speed, "free_memory", lambda device: 1000)
    found = compare(model, model)
    assert (found["dense"], found["sliced"]) == (None, None)
    assert "do not fit into the free memory" in found["note"]


@pytest.mark.parametrize(
    "error", [SliceGPTError("no such operator"), torch.OutOfMemoryError("no such operator")]
)
def test_an_error_costs_the_figure_and_not_the_run(model, monkeypatch, error, caplog):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(speed, "tokens_per_second", fail)
    assert compare(model, model)["note"] == "no such operator"
    assert "tokens/s were not measured: no such operator" in caplog.text
