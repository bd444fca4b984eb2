"""`bench slicing`: the dense pass's batch is chosen at a bounded cost, and a trace names the stages."""

import json

import pytest
import torch
from support.saved_models import save_dense
from support.tiny_models import tiny_model

from slicegpt.bench.commands import slicing_time
from slicegpt.bench.commands.slicing_time import dense_batch_size, fitting_batch
from slicegpt.calibration import CalibrationBatch
from slicegpt.cli import main
from slicegpt.recipe import Recipe

CPU = torch.device("cpu")


def test_the_batch_that_fits():
    """By hand: a token of this model holds 6 * 48 + 3 * its neurons numbers of 4 bytes."""
    model = tiny_model("llama", torch.float32)
    sample = 16 * (6 * 48 + 3 * model.config.intermediate_size) * 4
    for free, size in (
        (4 * 8 * sample, 8),
        (4 * 8 * sample - 1, 4),
        (4 * 2 * sample, 2),
        (4 * sample, 1),
        (0, 1),
    ):
        assert fitting_batch(model, 16, free) == size


@pytest.mark.parametrize(
    ("nsamples", "seconds", "expected", "passes"),
    [
        # Two passes of 8 samples are an eighth of 128: the trial decides.
        (128, {8: 1.0, 1: 2.0}, 8, [(8, 8), (8, 1)]),
        (128, {8: 2.0, 1: 1.0}, 1, [(8, 8), (8, 1)]),
        # They would be more than that: the batch that fits, without a trial.
        (127, {8: 2.0, 1: 1.0}, 8, []),
        (6, {6: 2.0, 1: 1.0}, 6, []),
        (1, {1: 1.0}, 1, []),
    ],
)
def test_at_most_one_trial(monkeypatch, nsamples, seconds, expected, passes):
    seen = []

    def batches_of(count, size):
        batch = CalibrationBatch(torch.zeros(size, 4, dtype=torch.long), torch.ones(size, 4))
        return [batch] * (count // size)

    def timed(model, batches, device):
        samples = sum(len(batch.input_ids) for batch in batches)
        seen.append((samples, len(batches[0].input_ids)))
        return seconds[len(batches[0].input_ids)]

    monkeypatch.setattr(slicing_time, "dense_pass", timed)
    monkeypatch.setattr(slicing_time, "free_memory", lambda device: 1 << 40)
    model = tiny_model("llama", torch.float32)
    assert dense_batch_size(model, batches_of, Recipe(nsamples=nsamples, seqlen=4), CPU) == expected
    assert seen == [(1, 1), *passes]  # a warm-up of one sample first
    assert sum(samples for samples, _ in seen[1:]) <= nsamples / 8


def test_trace_of_the_stages(tiny_tokenizer, tmp_path):
    folder = save_dense(tmp_path / "model", tiny_tokenizer)
    file, trace = tmp_path / "slicing.json", tmp_path / "trace.json"
    size = ["--slice", "0.25", "--round-to", "8", "--nsamples", "6", "--seqlen", "32", "--batch-size", "2"]
    arguments = ["bench", "slicing", "--model", str(folder), *size]
    assert main([*arguments, "--json", str(file), "--trace", str(trace)]) == 0
    content = json.loads(file.read_text())
    assert content["complete"] is not False
    assert content["tokens"] == 6 * 32  # of the run that was timed, and not of the one that was traced
    assert content["batch_choice_seconds"] >= 0
    ranges = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    stages = {row["stage"] for row in content["rows"]}
    named = {name.removeprefix("slicing / ") for name in ranges if name and name.startswith("slicing / ")}
    assert {"covariance", "eigensolver"} <= named
    assert named <= stages
