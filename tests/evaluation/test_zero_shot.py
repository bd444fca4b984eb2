"""Zero-shot accuracy through lm-eval, on a small task of our own: no network is needed."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.cli import main
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.evaluation.zero_shot import PAPER_TASKS, TaskScore, ZeroShotResult, ZeroShotTasks
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, slice_model

ROOT = Path(__file__).resolve().parents[2]
TASK = "everyday_knowledge"
FOLDER = ROOT / "tests/data"
QUESTIONS = [json.loads(line) for line in (FOLDER / TASK / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    """lm-eval reads a task's files from the current folder."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tasks():
    """The task of our own, found in our folder alone."""
    pytest.importorskip("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return ZeroShotTasks([TASK], FOLDER)


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer), max_position_embeddings=256)


@torch.no_grad()
def plain_log_likelihoods(model, tokenizer) -> list[list[float]]:
    """By definition: the sum of log-probabilities of the answer's tokens after the question's."""
    rows = []
    for row in QUESTIONS:
        rows.append([])
        for answer in row["choices"]:
            context = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
            whole = tokenizer(f"Question: {row['question']}\nAnswer: {answer}").input_ids
            logits = model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].double()
            tokens = torch.tensor(whole[len(context) :])
            rows[-1].append(logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item())
    return rows


def test_the_questions_are_sound():
    assert len({row["question"] for row in QUESTIONS}) == len(QUESTIONS) == 40
    assert all(len(set(row["choices"])) == 4 and row["answer"] in range(4) for row in QUESTIONS)
    # Always naming one position must not pay.
    assert max([row["answer"] for row in QUESTIONS].count(position) for position in range(4)) < 20


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_by_definition(tasks, tiny, tiny_tokenizer, batch_size):
    result = tasks.score(tiny, tiny_tokenizer, batch_size)
    expected = plain_log_likelihoods(tiny, tiny_tokenizer)
    actual = result.log_likelihoods[TASK]
    # Float32 logits, padded in lm-eval and not here, of up to 20 tokens of about 7 nats: some 1e-6 each.
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    plain, normed = 0, 0
    for row, values in zip(QUESTIONS, actual, strict=True):
        lengths = [len(answer) for answer in row["choices"]]
        plain += values.index(max(values)) == row["answer"]
        scaled = [value / length for value, length in zip(values, lengths, strict=True)]
        normed += scaled.index(max(scaled)) == row["answer"]
    (score,) = result.scores
    assert (score.task, score.questions) == (TASK, 40)
    assert score.accuracy == pytest.approx(plain / 40)
    assert score.accuracy_norm == pytest.approx(normed / 40)
    assert result.mean == score.reported == score.accuracy_norm


@pytest.mark.model
@pytest.mark.slow
def test_our_network_scores_what_hugging_face_scores(tasks, smollm2):
    """SmolLM2-135M at full width, every boundary turned by a random rotation, against LlamaForCausalLM."""
    model, tokenizer = smollm2
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, fields["dense_hidden_size"]), Shape("dense", "random"))
    turned, _ = slice_model(model, config, (), SlicingOptions(orientation="random"))
    expected = tasks.score(model, tokenizer, 16)
    actual = tasks.score(turned, tokenizer, 16)
    assert actual.scores == expected.scores
    assert expected.scores[0].accuracy > 0.5  # a quarter is chance
    # 60 rotations of logits of about 20 in float32 are 1e-5 off each; in float64 only transformers' own norms,
    # which stay in float32, differ.
    some = ZeroShotTasks([TASK], FOLDER, limit=6)
    likelihoods = [
        torch.tensor(some.score(each.double(), tokenizer, 16).log_likelihoods[TASK])
        for each in (copy.deepcopy(model), turned)
    ]
    torch.testing.assert_close(*likelihoods, rtol=0, atol=1e-4)


def test_mean_is_over_what_the_paper_reports():
    scores = (
        TaskScore("normed", 10, 0.5, 0.7, {}),
        TaskScore("plain", 10, 0.3, None, {}),
        TaskScore("perplexity", 10, None, None, {"word_perplexity": 9.0}),
    )
    assert ZeroShotResult(scores, {}, 1.0).mean == pytest.approx(0.5)
    assert ZeroShotResult(scores[2:], {}, 1.0).mean is None


def test_command_line(tasks, tiny, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    for name in ("first", "second"):
        tiny.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    file = tmp_path / "out.json"
    models = [str(tmp_path / "first"), str(tmp_path / "second")]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(row["question"] for row in QUESTIONS))
    both = ["--data", str(text), "--seqlen", "64", "--max-windows", "2", "--tasks", TASK, "--limit", "12"]
    assert main(["eval", *models, *both, "--include-path", str(FOLDER), "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    assert [row["tasks"][TASK]["questions"] for row in facts["models"]] == [12, 12]
    assert facts["models"][0]["tasks"] == facts["models"][1]["tasks"]
    assert facts["mean_accuracy"] == facts["tasks"][TASK]["acc_norm"]
    assert math.isfinite(facts["perplexity"])
    printed = capsys.readouterr().out
    assert f"{TASK}  acc_norm" in printed
    assert "acc_norm or acc" in printed


def bad(capsys, *arguments) -> str:
    assert main(["eval", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_errors_before_any_model_is_loaded(capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    assert "--limit needs --tasks" in bad(capsys, "m", "--data", "x.txt", "--limit", "3")
    assert "--windows need --data" in bad(capsys, "m", "--tasks", "piqa", "--max-windows", "3")
    assert "not a folder" in bad(capsys, "m", "--tasks", TASK, "--include-path", "no/such/folder")
    assert "--num-fewshot: must be at least 0" in bad(capsys, "m", "--tasks", TASK, "--num-fewshot", "-1")
    index = TaskManager(include_path=str(FOLDER))  # takes seconds: once
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: index)
    assert set(PAPER_TASKS) <= set(index.all_subtasks)
    assert "'everyday_knowlege' is no task of lm-eval; similar names: everyday_knowledge" in bad(
        capsys, "m", "--tasks", "everyday_knowlege"
    )
    # The tests have no hub: the paper's first task says so.
    line = bad(capsys, "m", "--tasks", "paper")
    assert "the data of 'piqa' cannot be had" in line
    assert "include_path" in line


def test_missing_extra(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "slicegpt[eval]"' in bad(capsys, "m", "--tasks", "piqa")


def test_old_lm_eval(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.9.2")
    with pytest.raises(SliceGPTError, match=r"lm-eval must be 0\.4\.13 or later, got 0\.4\.9\.2"):
        ZeroShotTasks(["piqa"])


def test_not_a_number(tasks, tiny, tiny_tokenizer):
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    with pytest.raises(
        SliceGPTError, match="log-likelihood of question 0 of everyday_knowledge is not finite"
    ):
        tasks.score(broken, tiny_tokenizer, 8)
