"""Recovery fine-tuning on a small model: what is learned, merged, kept apart, interrupted, and refused."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import relative_error, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from slicegpt.calibration import Source, load_sources
from slicegpt.checkpoint.saving import stored_size
from slicegpt.cli import main
from slicegpt.conversion.plan import Shape, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.modeling.sizes import skeleton

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from slicegpt.finetune import AdapterOptions, Schedule, TrainingOptions, attach, merge, training_text
from slicegpt.finetune.adapters import target_modules
from slicegpt.finetune.run import _training_arguments
from slicegpt.finetune.trainer import Clock, distillation_loss

WORKER = Path(__file__).parents[1] / "support" / "finetune_worker.py"
# 40 windows of 32 tokens, four held out; steps of 4 windows, so nine steps.
SHORT = ["--seqlen", "32", "--nsamples", "36", "--eval-samples", "4", "--eval-every", "3", "--rank", "4"]
QUICK = [*SHORT, "--learning-rate", "1e-2", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("\n\n".join(documents)[:12_000], encoding="utf-8")
    return file


def slice_into(folder, text, tokenizer, *shape, case="llama"):
    """A tiny model sliced by a quarter and saved."""
    dense = folder / "dense"
    tiny_model(case, torch.float32, vocab_size=len(tokenizer)).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    size = [
        "--slice",
        "0.25",
        "--round-to",
        "4",
        "--nsamples",
        "8",
        "--seqlen",
        "32",
        "--no-refit",
    ]  # more is left to recover
    arguments = ["slice", dense, *size, "--calibration", text, *shape, "--output", folder / "sliced"]
    assert main(list(map(str, arguments))) == 0
    return folder / "sliced"


@pytest.fixture(scope="module")
def sliced(tmp_path_factory, text, tiny_tokenizer):
    """Compact shortcuts."""
    return slice_into(tmp_path_factory.mktemp("compact"), text, tiny_tokenizer)


@pytest.fixture(scope="module")
def sliced_dense(tmp_path_factory, text, tiny_tokenizer):
    """Dense shortcuts, as published."""
    return slice_into(tmp_path_factory.mktemp("dense"), text, tiny_tokenizer, "--shortcut", "dense")


def tune(folder, text, output, *more) -> dict:
    report = output.with_suffix(".json")
    arguments = ["finetune", folder, "--data", text, "--output", output, *QUICK, *more, "--json", report]
    assert main(list(map(str, arguments))) == 0
    return json.loads(report.read_text())


def bad(capsys, *arguments) -> str:
    assert main(["finetune", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def logits_of(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


def held_out(text, folder):
    """The windows that the runs of `QUICK` evaluate on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return training_text([text.read_text(encoding="utf-8")], tokenizer, 32, 36, 4).held_out.ids


@pytest.fixture(scope="module")
def ids(tiny_tokenizer, documents):
    return tiny_tokenizer(documents[3], return_tensors="pt").input_ids[:, :48]


# --- what is written -----------------------------------------------------------------------------------------------


def test_merged_model_is_better_and_no_larger(sliced, text, tmp_path, capsys):
    facts = tune(sliced, text, tmp_path / "tuned")
    assert facts["steps"] == 9
    assert facts["tokens"] == 36 * 32
    assert facts["loss_after"] < facts["loss_before"] - 0.05
    assert stored_size(tmp_path / "tuned") == stored_size(sliced)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned", "tuned.json"]
    old, new = (json.loads((folder / "slicing.json").read_text()) for folder in (sliced, tmp_path / "tuned"))
    assert {name: new[name] for name in old} == old
    assert new["finetuning"]["data"]["source"] == str(text)
    assert new["finetuning"]["adapters"]["alpha"] == 10
    assert new["finetuning"]["result"]["loss_after"] == facts["loss_after"]
    assert "Fine-tuned after slicing" in (tmp_path / "tuned/README.md").read_text(encoding="utf-8")
    assert "tuned" in capsys.readouterr().out
    # The held-out loss of the saved model, by definition, on the same windows.
    windows = held_out(text, sliced)
    logits = logits_of(tmp_path / "tuned", windows)[:, :-1].double().flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).item()
    # Dropout is off in both; float32 logits of about 7 nats, means over 124 tokens.
    assert loss == pytest.approx(facts["loss_after"], abs=1e-4)


@pytest.mark.parametrize("kind", ["sliced", "sliced_dense"])
@pytest.mark.parametrize("more", [(), ("--targets", "all-linear", "--train-shortcuts")])
def test_merged_and_kept_apart_agree(kind, more, text, tmp_path, ids, request):
    """Two runs of the same seed, one merged, the other a PEFT folder that loads onto the sliced model."""
    from peft import PeftModel

    folder = request.getfixturevalue(kind)
    tune(folder, text, tmp_path / "merged", *more)
    tune(folder, text, tmp_path / "apart", *more, "--no-merge")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "finetuning.json"} <= {
        path.name for path in (tmp_path / "apart").iterdir()
    }
    apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "apart").eval()
    with torch.no_grad():
        unmerged = apart(ids).logits
        again = apart.merge_and_unload()(ids).logits
    merged = logits_of(tmp_path / "merged", ids)
    # Float32 both: W x + B A x and (W + B A) x differ by a few roundings of 6e-8 in each of some twenty layers.
    assert relative_error(merged, unmerged) < 1e-5
    assert relative_error(merged, again) < 1e-5
    before = logits_of(folder, ids)
    assert relative_error(merged, before) > 1e-2
    weights, old = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", folder))
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in old if not weights[name].equal(old[name])
    }
    expected = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    if more:
        expected |= {"o_proj", "down_proj", "attention_shortcut", "mlp_shortcut"}
    assert changed == expected


def test_merging_is_exact_in_float64(sliced):
    """`merge` against `W + alpha / r * B A` written out, for random adapters."""
    torch.manual_seed(0)
    plain, wrapped = (AutoModelForCausalLM.from_pretrained(sliced) for _ in range(2))
    adapted = attach(wrapped, AdapterOptions("all-linear", rank=3, alpha=7, train_shortcuts=True))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    state = adapted.state_dict()
    old = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    merged = merge(plain, adapted).state_dict()
    checked = 0
    for name, weight in merged.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.default.weight" in state:
            down, up = (state[f"{stem}.lora_{side}.default.weight"].double() for side in "AB")
            assert weight.equal((old[name].double() + 7 / 3 * (up @ down)).float())
        elif name.endswith(".factor"):
            stem = f"base_model.model.{name.removesuffix('.factor')}"
            assert weight.equal(state[f"{stem}.modules_to_save.default.factor"])
        else:
            assert weight.equal(old[name])
            continue
        checked += 1
    assert checked == 3 * (7 + 2)


@pytest.mark.parametrize("case", ["opt", "phi", "llama-tied"])
def test_other_families(case, text, tmp_path, tiny_tokenizer):
    folder = slice_into(tmp_path, text, tiny_tokenizer, case=case)
    facts = tune(folder, text, tmp_path / "tuned", "--targets", "all-linear", "--train-shortcuts")
    assert facts["loss_after"] < facts["loss_before"]
    assert stored_size(tmp_path / "tuned") == stored_size(folder)


def test_distillation_loss_by_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    labels = torch.randint(11, (2, 5), generator=generator)
    p, q = (logits.double().softmax(-1) for logits in (teacher, student))
    divergence = (p * (p / q).log()).sum(-1).mean()
    token_loss = -q.gather(-1, labels[..., None]).log().mean()
    for weight in (0.0, 0.3, 1.0):
        expected = weight * divergence + (1 - weight) * token_loss
        # Float32 sums of eleven terms.
        torch.testing.assert_close(
            distillation_loss(student, teacher, labels, weight).double(), expected, rtol=1e-5, atol=1e-6
        )


def test_teacher(sliced, text, tmp_path):
    """Taught by the dense model alone, the sliced model comes nearer to its distribution on held-out text."""
    teacher = sliced.parent / "dense"
    rate = ("--learning-rate", "5e-3", "--epochs", "4", "--dropout", "0", "--targets", "all-linear")
    tune(sliced, text, tmp_path / "taught", "--teacher", teacher, "--teacher-weight", "1", *rate)
    windows = held_out(text, sliced)
    divergences = [
        distillation_loss(logits_of(folder, windows), logits_of(teacher, windows), windows, 1.0)
        for folder in (sliced, tmp_path / "taught")
    ]
    assert divergences[1] < 0.98 * divergences[0]


def test_bfloat16_arithmetic_and_gradient_checkpointing(sliced, text, tmp_path, ids):
    plain = tune(sliced, text, tmp_path / "plain", "--dropout", "0")
    kept = tune(sliced, text, tmp_path / "kept", "--dropout", "0", "--gradient-checkpointing")
    # The same operations, done twice.
    assert kept["loss_after"] == pytest.approx(plain["loss_after"], abs=1e-6)
    half = tune(sliced, text, tmp_path / "half", "--dropout", "0", "--precision", "bf16", "--train-shortcuts")
    assert half["loss_after"] < half["loss_before"] - 0.05
    # The result is float32 as the sliced model is; only the way there was computed with 8-bit mantissas.
    assert load_file(tmp_path / "half/model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert half["loss_before"] == pytest.approx(plain["loss_before"], abs=0.05)


# --- interruptions -------------------------------------------------------------------------------------------------


def test_killed_run_resumes_to_the_same_weights(sliced, text, tmp_path, capsys):
    """Killed while its second checkpoint is half written, a run goes on from the first one."""
    tune(sliced, text, tmp_path / "whole")
    output = tmp_path / "killed"
    arguments = ["finetune", sliced, "--data", text, "--output", output, *QUICK]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, WORKER, "6", *map(str, arguments)], env=environment, capture_output=True
    )
    assert killed.returncode == -9
    work = tmp_path / "killed.checkpoints"
    assert not output.exists()
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}

    line = bad(capsys, *arguments[1:])
    assert "killed.checkpoints holds an unfinished run; resume it, or overwrite it" in line
    line = bad(capsys, *arguments[1:], "--resume", "--rank", "2")
    assert "was begun with adapters.rank = 4, now it is 2" in line
    facts = tune(sliced, text, output, "--resume")
    assert facts["steps"] == 9
    assert not work.exists()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    for name, weight in whole.items():
        # The same operations in the same order: equal but for the threads' summation order in another process.
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-7)
    assert json.loads((tmp_path / "whole.json").read_text())["loss_before"] == pytest.approx(
        facts["loss_before"]
    )


def test_resume_without_checkpoints_begins(sliced, text, tmp_path):
    assert tune(sliced, text, tmp_path / "tuned", "--resume")["steps"] == 9


def test_diverged_run_keeps_the_last_good_state(sliced, text, tmp_path, capsys, monkeypatch):
    """The loss is a NaN from the fifth step on: the run stops, and goes on with a lower learning rate."""
    from slicegpt.finetune.trainer import RecoveryTrainer

    compute = RecoveryTrainer.compute_loss

    def spoiled(self, *arguments, **keywords):
        loss = compute(self, *arguments, **keywords)
        return loss * math.nan if self.model.training and self.state.global_step >= 4 else loss

    output = tmp_path / "tuned"
    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "compute_loss", spoiled)
        line = bad(capsys, sliced, "--data", text, "--output", output, *QUICK)
    assert re.search(
        r"the gradient of step 5 is not finite; the last good state is .*checkpoint-3; resume", line
    )
    assert not output.exists()
    saved = load_file(tmp_path / "tuned.checkpoints/checkpoint-3/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert tune(sliced, text, output, "--resume", "--learning-rate", "1e-3")["steps"] == 9


def test_early_stopping_keeps_the_best(sliced, text, tmp_path, capsys):
    """At an absurd learning rate the held-out loss rises; the run ends before its steps do."""
    more = (
        "--epochs",
        "20",
        "--patience",
        "2",
        "--learning-rate",
        "0.3",
        "--schedule",
        "constant",
        "--warmup",
        "0",
    )
    facts = tune(sliced, text, tmp_path / "tuned", *more)
    assert facts["steps"] < 180
    assert facts["best_step"] <= facts["steps"] - 6
    lines = re.findall(r"step (\d+) of 180: held-out loss ([\d.]+)", capsys.readouterr().err)
    losses = {int(step): float(loss) for step, loss in lines if step != "0"}
    assert min(losses, key=losses.get) == facts["best_step"]


def test_time_limit(sliced, text, tmp_path):
    facts = tune(sliced, text, tmp_path / "tuned", "--epochs", "100000", "--max-minutes", "0.05")
    assert 0 < facts["steps"] < 900_000
    assert (tmp_path / "tuned/model.safetensors").is_file()


def test_clock_counts_the_time_before_an_interruption():
    clock = Clock(100.0)
    state = type(
        "State",
        (),
        {"log_history": [{"elapsed": 30.0}, {"elapsed": 50.0}], "global_step": 4, "max_steps": 100},
    )
    clock.on_train_begin(None, state, None)
    clock.on_step_begin(None, state, None)
    assert 50 <= clock.elapsed() < 60
    assert clock.progress == pytest.approx(0.5, abs=0.1)  # by time, not by steps


def test_two_processes(sliced, text, tmp_path):
    """torchrun with two CPU processes: the batches are shared out, the result is that of one process."""
    report = tmp_path / "two.json"
    arguments = ["finetune", sliced, "--data", text, "--output", tmp_path / "two", *QUICK, "--json", report]
    arguments += ["--dropout", "0", "--accumulation", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launcher, "-m", "slicegpt", *map(str, arguments)], env=environment, check=True, timeout=300
    )
    facts = json.loads(report.read_text())
    alone = tune(sliced, text, tmp_path / "one", "--dropout", "0")
    assert facts["steps"] == alone["steps"]
    assert facts["tokens"] == alone["tokens"]
    # The same batches, gradients averaged in another order; Adam divides small numbers by small numbers.
    assert facts["loss_after"] == pytest.approx(alone["loss_after"], abs=1e-3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(relative_error(two[name], weight) for name, weight in one.items() if weight.numel()) < 1e-2


# --- parts -----------------------------------------------------------------------------------------------------------


def test_targets():
    def names(case, targets, **more):
        fields = canonical_fields(tiny_model(case))
        blocks = 3 if case == "phi" else 6
        sliced = skeleton(plan(fields, [36] * blocks + [48], Shape("dense", round_to=4)))
        return target_modules(sliced, AdapterOptions(targets, **more))

    assert names("llama", "inputs") == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert names("opt", "inputs") == ["k_proj", "q_proj", "up_proj", "v_proj"]
    assert names("opt", "qv") == ["q_proj", "v_proj"]
    assert "shortcut" in names("phi", "all-linear")
    assert "shortcut" not in names("phi", "all-linear", train_shortcuts=True)
    tied = names("llama-tied", "all-linear")
    assert "embed_projection" in tied
    assert "lm_head" not in tied
    assert names("llama", ("q_proj", "o_proj")) == ["o_proj", "q_proj"]
    with pytest.raises(
        SliceGPTError, match=r"targets: lm_head: this model's linear layers are attention_shortcut"
    ):
        names("llama", ("q_proj", "lm_head"))
    with pytest.raises(SliceGPTError, match="targets: must be one of inputs, qv, all-linear or names"):
        names("llama", "everything")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0]), ("constant", [0.5, 1, 1, 1])],
)
def test_schedule(kind, expected):
    schedule = Schedule(3e-4, 0.2, kind)
    rates = [schedule.rate(progress) / 3e-4 for progress in (0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert Schedule(3e-4, 0, kind).rate(0) == 3e-4


def test_windows_are_dealt_once(tiny_tokenizer, documents):
    text = training_text(documents, tiny_tokenizer, seqlen=16, nsamples=50, eval_samples=20)
    rows = [tuple(row) for part in (text.train, text.held_out) for row in part.ids.tolist()]
    assert (len(text.train), len(text.held_out)) == (50, 20)
    everything = torch.tensor(tiny_tokenizer("\n\n".join(documents)).input_ids)
    windows = everything[: len(everything) // 16 * 16].view(-1, 16).tolist()
    positions = [windows.index(list(row)) for row in rows]
    assert len(set(positions)) == len(rows)  # this text repeats no window
    again = training_text(documents, tiny_tokenizer, seqlen=16, nsamples=50, eval_samples=20)
    assert again.sha256() == text.sha256()
    other = training_text(documents, tiny_tokenizer, 16, 50, 20, eval_documents=documents[:3])
    assert other.sha256() != text.sha256()
    whole = torch.tensor(tiny_tokenizer("\n\n".join(documents[:3])).input_ids)
    own = {tuple(row) for row in whole[: len(whole) // 16 * 16].view(-1, 16).tolist()}
    assert set(map(tuple, other.held_out.ids.tolist())) <= own


def test_windows_of_several_texts_in_the_proportion_of_their_weights(tiny_tokenizer, documents):
    """The text that has the fewest windows for its weight decides how many there are."""
    texts = [documents[:1], documents[1:]]
    sources = [Source(name, weight, text) for name, weight, text in zip("ab", (2.0, 1.0), texts, strict=True)]
    mixed = training_text(sources, tiny_tokenizer, 16, eval_samples=4)
    rows = set(map(tuple, torch.cat([mixed.train.ids, mixed.held_out.ids]).tolist()))
    counts = []
    for text in texts:
        ids = torch.tensor(tiny_tokenizer("\n\n".join(text)).input_ids)
        windows = set(map(tuple, ids[: len(ids) // 16 * 16].view(-1, 16).tolist()))
        counts.append((len(rows & windows), len(windows)))
    assert counts[0][0] == counts[0][1]  # all of the first
    assert counts[1][0] == pytest.approx(counts[0][0] / 2, abs=1)
    assert len(rows) == counts[0][0] + counts[1][0]
    with pytest.raises(SliceGPTError, match="data: self is not text to train on"):
        training_text(load_sources("self"), tiny_tokenizer)


def test_text_columns_and_mixtures_on_the_command_line(sliced, documents, tmp_path):
    """One column name serves both texts, and the one of them that has columns."""
    pieces = "\n\n".join(documents)[:24_000].split("\n\n")
    names = ["train.jsonl", "eval.jsonl", "plain.txt"]
    for name, part in zip(names, (pieces[::3], pieces[1::3], pieces[2::3]), strict=True):
        lines = [json.dumps({"content": piece}) for piece in part] if name.endswith("jsonl") else part
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    train, held_out, plain = (tmp_path / name for name in names)
    few = ["--nsamples", "4", "--eval-samples", "2", "--text-column", "content"]
    for data, more in (
        (train, ["--eval-data", held_out]),
        (f"{train}:2,{plain}:1", []),
        (plain, ["--eval-data", held_out]),
    ):
        facts = tune(sliced, data, tmp_path / "out", *few, *more, "--overwrite")
        assert facts["steps"] == 1


def test_the_model_that_is_tuned_is_not_replaced(sliced, text, tmp_path, capsys):
    line = bad(capsys, sliced, "--data", text, "--output", sliced, "--overwrite", *QUICK)
    assert "would replace the model" in line
    assert (sliced / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--rank", "0"), "--rank: must be at least 1, got 0"),
        (("--alpha", "0"), "--alpha: must be above 0"),
        (("--dropout", "1"), r"--dropout: must lie in \[0, 1\)"),
        (("--learning-rate", "nan"), "--learning-rate: must be above 0, got nan"),
        (("--warmup", "1"), r"--warmup: must lie in \[0, 1\)"),
        (("--max-minutes", "0"), "--max-minutes: must be above 0"),
        (("--batch-size", "0"), "--batch-size: must be at least 1"),
        (("--teacher-weight", "2"), r"--teacher-weight: must lie in \[0, 1\]"),
        (("--seqlen", "4096"), "--seqlen: 4096 is beyond the model's 64 positions"),
        (("--nsamples", "100000"), "--nsamples: 100000 windows of 32 tokens were asked for"),
        (("--targets", "q_proj,head"), "--targets: head: this model's linear layers are"),
        (("--teacher", "no/such/model"), "does not exist|no local folder"),
        (("--data", "no/such/text"), "--data: no/such/text"),
        (("--device", "cuda:77"), "--device: cuda:77 is not there"),
    ],
)
def test_bad_options(sliced, text, tmp_path, capsys, changes, message):
    line = bad(capsys, sliced, "--data", text, "--output", tmp_path / "out", *QUICK, *changes)
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_not_a_sliced_folder(sliced, text, tmp_path, capsys):
    line = bad(capsys, sliced.parent / "dense", "--data", text, "--output", tmp_path / "out", *QUICK)
    assert "is not a folder that `slicegpt slice` wrote" in line
    assert "exists already" in bad(capsys, sliced, "--data", text, "--output", tmp_path, *QUICK)


def test_missing_extra():
    script = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "peft" else find(name, *more)
import slicegpt
from slicegpt.cli import main
sys.exit(main(["finetune", "m", "--data", "d", "--output", "o"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'fine-tuning needs peft: pip install "slicegpt[finetune]"' in done.stderr


def test_defaults_are_the_papers():
    adapters, training = AdapterOptions(), TrainingOptions()
    assert (adapters.rank, adapters.alpha, adapters.dropout, adapters.targets) == (32, 10, 0.05, "inputs")
    assert training.seqlen == 1024


def test_a_numbered_device_is_told_to_accelerate_and_the_environment_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    arguments = _training_arguments(tmp_path, TrainingOptions(), torch.device("cpu", 0))
    assert arguments.device.type == "cpu"
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
