"""Every table that a command prints fits the terminal, whatever its width."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.saved_models import save_dense

from slicegpt.bench.commands.predict import predict
from slicegpt.bench.commands.reproduce import tables
from slicegpt.bench.harness.columns import COLUMNS
from slicegpt.bench.harness.display import print_rows, print_summary, print_table, stage_table
from slicegpt.bench.models.devices import device_named
from slicegpt.checkpoint.report import SliceReport
from slicegpt.cli import env, main
from slicegpt.cli.finetune import print_result
from slicegpt.cli.prediction import SECONDARY as PUBLISHED_SECONDARY
from slicegpt.evaluation.frontier import table_rows
from slicegpt.evaluation.perplexity import PerplexityResult
from slicegpt.evaluation.report import Evaluation, evaluation_tables
from slicegpt.evaluation.zero_shot import TaskScore, ZeroShotResult
from slicegpt.finetune.saving import FinetuneResult
from slicegpt.table import fit_text, format_facts, format_table, output_width

RECORDED = Path(__file__).parents[1] / "bench" / "results" / "cpu"
recorded = pytest.mark.skipif(not RECORDED.is_dir(), reason="needs the source tree")
WIDTHS = (80, 60, 40)


def read(name: str) -> dict:
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.fixture(params=WIDTHS)
def columns(request, monkeypatch) -> int:
    """The terminal's width, as COLUMNS says it."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


# --- the rule ---------------------------------------------------------------------------------------------------

ROW = {
    "network": "sliced 25 %",
    "engine": "fused",
    "ms per token": 20.5,
    "p10": 19.25,
    "of bandwidth": "80 %",
}


def test_a_table_that_fits_is_not_touched():
    whole = format_table([ROW], list(ROW), width=None)
    assert widest(whole) == 54
    assert format_table([ROW], list(ROW), width=54) == whole
    assert format_table([ROW], list(ROW), width=54, secondary=["p10"]) == whole


def test_titles_break_first():
    assert format_table([ROW], list(ROW), width=50).splitlines() == [
        "                     ms per",
        "network      engine   token    p10  of bandwidth",
        "-----------  ------  ------  -----  ------------",
        "sliced 25 %  fused     20.5  19.25          80 %",
    ]
    assert format_table([ROW], list(ROW), width=47).splitlines()[:2] == [
        "                     ms per                of",
        "network      engine   token    p10  bandwidth",
    ]


def test_secondary_columns_go_next_and_are_named():
    """By hand: with all titles broken 11 + 6 + 5 + 5 + 9 and four gaps of two are 44; without p10 37."""
    shown = format_table([ROW], list(ROW), width=40, secondary=["p10", "engine"])
    assert shown.splitlines()[:4] == [
        "                     ms per         of",
        "network      engine   token  bandwidth",
        "-----------  ------  ------  ---------",
        "sliced 25 %  fused     20.5       80 %",
    ]
    assert shown.splitlines()[4:] == ["Left out at this width: p10."]


def test_text_breaks_then_rows_become_blocks():
    rows = [{"text": "a sentence of several words", "n": 1}, {"text": "b", "n": 2}]
    broken = format_table(rows, ["text", "n"], width=20)
    assert widest(broken) <= 20
    assert broken.splitlines()[2:] == ["a sentence of  1", "several words", "b              2"]
    blocks = format_table(rows, ["text", "n"], width=12)
    assert blocks.splitlines()[:4] == ["text  a sent", "      ence", "      of sev", "      eral"]
    assert blocks.count("\n\n") == 1


def test_blocks_hold_what_a_table_would_leave_out():
    shown = format_table([ROW], list(ROW), width=22, secondary=["p10"])
    assert widest(shown) <= 22
    assert re.search(r"^p10\s+19.25$", shown, re.MULTILINE)


TEXT = st.text(alphabet="abc /-%_1", min_size=1, max_size=40).filter(lambda text: text.strip() == text)
VALUES = st.one_of(st.none(), st.integers(0, 10**10), st.floats(0, 1e6), TEXT)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), names=st.lists(TEXT, min_size=1, max_size=9, unique=True), width=st.integers(24, 140))
def test_no_table_is_wider_than_its_output(data, names, width):
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, VALUES)), min_size=1, max_size=4))
    secondary = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    assert widest(format_table(rows, names, width, secondary)) <= width
    assert widest(format_facts([(name, rows[0][name]) for name in names], width)) <= width


def test_a_pipe_has_no_width_and_a_terminal_has_its_own(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_width() is None  # pytest's capture is no terminal
    long = "word " * 40
    assert fit_text(long) == long
    monkeypatch.setenv("COLUMNS", "50")
    assert output_width() == 50
    assert widest(fit_text(long)) <= 50
    monkeypatch.setenv("COLUMNS", "0")
    assert output_width() is None


# --- every printer ----------------------------------------------------------------------------------------------


def printed(capsys) -> str:
    text = capsys.readouterr().out
    assert text.strip()
    return text


@recorded
@pytest.mark.parametrize(
    "name",
    ["token", "token-1b", "throughput", "throughput-1b", "layers", "layers-1b", "slicing", "slicing-1b"],
)
def test_summaries_of_runs(name, columns, capsys):
    print_summary(read(name))
    assert widest(printed(capsys)) <= columns


@recorded
def test_experiments(columns, capsys):
    gram, rotation, frontier = read("gram"), read("rotation"), read("frontier")
    print_rows("gram", gram["gram"])
    print_rows("eigensolver", gram["eigensolver"])
    print_rows("gram predictions", gram["predictions"])
    print_rows("rotation", rotation["rows"][:12])
    print_rows("sizes", read("sizes")["rows"])
    print_rows("vllm", read("vllm")["models"])
    print_rows("equal size", read("equal_size")["rows"])
    print_table(*stage_table(read("refit")["rows"]))
    own = frontier["comparisons"]["ours"]
    print_rows("comparison", [{**row, "method": "ours", "perplexity": row["ours"]} for row in own])
    assert widest(printed(capsys)) <= columns


def test_rows_that_no_recorded_result_has(columns, capsys):
    print_rows(
        "decode attention",
        [{"model": "llama-2-70b", "batch": 16, "tokens": 16384, "dtype": "bfloat16", "by": "triton"}
         | {"µs a layer": 123.456, "GB/s": 4123.4}],
    )  # fmt: skip
    draft = {"draft": "runs/drafts/params-0.8", "accepted": "61.2 %", "tokens a pass": 2.81}
    print_rows("speculative", [draft | {"tokens/s": 31.4, "ratio": 1.21, "differing": 0}])
    print_rows(
        "agreement",
        [{"result": "Time per token: smollm2-135m", "ratio of": "sliced 25 % over dense, fused, bfloat16"}
         | {"first": 1.16, "second": 1.09, "apart": 0.064}],
    )  # fmt: skip
    rows = [predict("llama-2-70b", fraction, device_named("a100-40"), 4) for fraction in (0.0, 0.25)]
    print_rows("predict", rows)
    assert widest(printed(capsys)) <= columns


def test_published_figures(columns):
    for rows, notes in tables().values():
        assert widest(format_table(rows, list(rows[0]), secondary=PUBLISHED_SECONDARY)) <= columns
        assert all(widest(fit_text(note)) <= columns for note in notes)


def test_environment(columns):
    facts = env.describe()
    facts["devices"] = [
        {"device": "cuda:0", "name": "NVIDIA H200", "capability": "9.0", "memory": 150_000_000_000}
    ]
    text = env.described(facts)
    assert widest(text) <= columns
    assert "cuda:0" in text
    assert "sm_90" in text


def test_info(columns, capsys, tmp_path, tiny_tokenizer):
    save_dense(tmp_path / "dense", tiny_tokenizer)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "dense"), "--boundaries"]) == 0
    assert widest(printed(capsys)) <= columns


def test_what_slicing_ends_with(columns):
    if columns < 60:
        pytest.skip("its last line is a sentence of 53 characters")
    kinds = ["compact"] * 59 + ["dense", "none"]
    record = {
        "size": {"dense_parameters": 134_515_008, "dense_bytes": 538_060_032, "parameters": 121_023_424}
        | {"bytes": 484_093_696, "removed": 0.1003, "decoder_parameters": 90_000_000},
        "dtype": "float32",
        "asked": {"keep": 0.9},
        "perplexity": {"dense": 18.17, "sliced": 19.97, "tokens": 1020, "chose_ridge": True},
        "tokens_per_second": {"dense": 67.5, "sliced": 71.0, "device": "cpu", "threads": 2},
        "dense_width": 576,
        "dense_neurons": 1536,
        "neurons": [720, 1536] * 15,
        "boundaries": [{"width": 560, "rank": 16, "shortcut": kind} for kind in kinds],
        "slicing": 0.028,
        "calibration": {"tokens": 5120},
        "seconds": {"signals": 60.1},
    }
    assert widest(str(SliceReport(record))) <= columns


def test_evaluations(columns):
    results = [
        Evaluation(
            name,
            134_515_008,
            "float32",
            PerplexityResult(12.3456, 24_552, 2.513, 24, 61.5),
            ZeroShotResult(
                (TaskScore("arc_challenge", 1172, 0.41, 0.43, {"acc": 0.41, "acc_norm": 0.43}),), {}, 31.5
            ),
        )
        for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "runs/sliced/smollm2-135m-params-0.9")
    ]
    assert widest(evaluation_tables(results)) <= columns
    assert widest(evaluation_tables(results[:1])) <= columns


@recorded
def test_frontier(columns):
    points = [point for point in read("frontier")["points"]]
    points.sort(key=lambda point: point["method"] != "dense")
    rows = table_rows(points, "total")
    names = list(dict.fromkeys(name for row in rows for name in row))
    assert widest(format_table(rows, names, secondary=("parameters", "size", "width"))) <= columns


def test_finetuning(columns, capsys):
    print_result(FinetuneResult(Path("tuned"), 4.08, 4.59, 250, 250, 256_000, 6_021_120, 781.2))
    assert widest(printed(capsys)) <= columns


def test_columns_that_may_be_left_out_are_columns():
    from slicegpt.bench.harness.columns import SECONDARY

    for kind, left_out in SECONDARY.items():
        if kind != "tuned":  # printed by its own columns
            assert set(left_out) <= {title for _, title, _ in COLUMNS[kind]}
