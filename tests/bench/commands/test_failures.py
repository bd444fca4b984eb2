"""Cases that fail while others are measured: reported, their memory given back, and the rest goes on."""

import gc
import json
import weakref
from collections.abc import Callable

import pytest
import torch

from slicegpt.bench.commands.throughput import ThroughputOptions, measure_throughput
from slicegpt.bench.commands.token_time import TokenOptions, measure_token_times
from slicegpt.bench.harness.display import LEAK_BYTES, notes, skipped_line
from slicegpt.bench.harness.record import Record
from slicegpt.bench.models import engines as engines_module
from slicegpt.bench.models.decoders import ForwardDecoder
from slicegpt.bench.models.engines import BenchmarkCase, Engine, chosen_engines
from slicegpt.cli import main

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick_peaks")


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def broken() -> Exception:
    return ValueError("no kernel\nfor this")


class Failing:
    """An engine that is the plain one until a certain step, at or above a batch; knows what it left in memory."""

    def __init__(self, error: Callable[[], Exception], after: int, from_batch: int = 1):
        self.held: list[weakref.ref] = []
        self.steps = 0
        outer = self

        class Decoder(ForwardDecoder):
            def step(self) -> None:
                if self.batch >= from_batch:
                    outer.steps += 1
                    if outer.steps > after:
                        block = torch.zeros(1 << 20)
                        outer.held.append(weakref.ref(block))
                        raise error()
                super().step()

        self.engine = Engine(
            "failing", lambda network, batch, length: Decoder(network.canonical(), batch, length)
        )

    def left_something(self) -> bool:
        gc.collect()
        assert self.held  # it did fail
        return any(reference() is not None for reference in self.held)


def cases_with(failing: Failing, network) -> list[BenchmarkCase]:
    return [BenchmarkCase(network, failing.engine), BenchmarkCase(network, chosen_engines(["plain"])[0])]


@pytest.mark.parametrize(
    ("error", "reason"), [(out_of_memory, "out of memory"), (broken, "ValueError: no kernel")]
)
@pytest.mark.parametrize(
    ("after", "tokens"),
    [
        (
            5 + 5,
            4,
        ),  # four steps to warm up and a round of four, each with one before; nothing of the second round
        (5 + 3, 0),  # within the first round, which is lost
        (2, 0),  # warming up
    ],
)
def test_token_decoding_that_fails(error, reason, after, tokens, tiny_networks):
    (network,) = tiny_networks((0.5,))
    failing, record = Failing(error, after), Record("token", {}, CPU)
    measure_token_times(
        cases_with(failing, network), TokenOptions(tokens=8, prompt=5, rounds=2), None, record
    )
    assert {row["engine"]: row["tokens"] for row in record.rows} == (
        {"failing": 4, "plain": 8} if tokens else {"plain": 8}
    )
    assert all(row["same_tokens"] == row["tokens"] for row in record.rows)
    (skipped,) = record.content["skipped"]
    what = f"measured in part (4 of 8 tokens: {reason})" if tokens else f"not measured ({reason})"
    assert skipped_line(skipped) == f"sliced 50 %, failing: {what}"
    assert not failing.left_something()


OPTIONS = ThroughputOptions(seqlen=12, steps=2, max_batch=2, rounds=2, tolerance=0.99)


def steps_of_search(network, options: ThroughputOptions) -> int:
    """How many steps the search takes, up to where the best batches are measured again."""
    counting = Failing(out_of_memory, after=1 << 30)
    without_rounds = ThroughputOptions(**{**vars(options), "rounds": 0})
    measure_throughput(
        [BenchmarkCase(network, counting.engine)], without_rounds, Record("throughput", {}, CPU)
    )
    return counting.steps


@pytest.mark.parametrize(
    ("error", "reason"), [(out_of_memory, "out of memory"), (broken, "ValueError: no kernel")]
)
def test_best_batch_that_fails_when_it_is_measured_again(error, reason, tiny_networks):
    (network,) = tiny_networks((0.5,))
    failing = Failing(error, after=steps_of_search(network, OPTIONS) + 1)
    record = Record("throughput", {}, CPU)
    measure_throughput(cases_with(failing, network), OPTIONS, record)
    first, second = record.rows
    assert (len(first["rounds"]), len(second["rounds"])) == (0, 2)
    assert first["tokens_per_second"] > 0
    (skipped,) = record.content["skipped"]
    line = skipped_line(skipped)
    assert line.startswith("sliced 50 %, failing: measured in part (measured again: ")
    assert f"{reason} at batch" in line
    assert not failing.left_something()


def test_search_that_fails_keeps_the_batches_before(tiny_networks):
    (network,) = tiny_networks((0.5,))
    failing, record = Failing(broken, after=0, from_batch=2), Record("throughput", {}, CPU)
    measure_throughput(cases_with(failing, network), OPTIONS, record)
    first, second = record.rows
    assert (first["batch"], first["stop"]) == (1, "error")
    assert first["reason"] == "ValueError: no kernel at batch 2"
    assert first["rounds"] == []
    assert (second["engine"], second["largest_batch"]) == ("plain", 2)
    assert skipped_line(record.content["skipped"][0]) == (
        "sliced 50 %, failing: measured in part (ValueError: no kernel at batch 2)"
    )
    assert not failing.left_something()


def test_case_that_cannot_even_warm_up_has_no_row(tiny_networks):
    (network,) = tiny_networks((0.5,))
    failing, record = Failing(broken, after=0), Record("throughput", {}, CPU)
    measure_throughput(cases_with(failing, network), OPTIONS, record)
    assert [row["engine"] for row in record.rows] == ["plain"]
    assert (
        skipped_line(record.content["skipped"][0])
        == "sliced 50 %, failing: not measured (ValueError: no kernel)"
    )


@pytest.mark.parametrize(("leaked", "named"), [(LEAK_BYTES, False), (2 * LEAK_BYTES, True)])
def test_memory_that_was_not_given_back_is_named(leaked, named):
    row = {"network": "dense", "engine": "hf", "leaked_bytes": leaked}
    environment = {"load_average": None, "threads": 1}
    told = notes({"rows": [row], "complete": True, "environment": environment})
    assert told == (
        ["Memory that a batch did not give back, above 64.0 MB: dense hf 128.0 MB."] if named else []
    )


@pytest.mark.parametrize("command", ["token", "throughput"])
def test_error_in_the_middle_keeps_what_was_measured_and_goes_on(
    command, tiny_folder, tmp_path, monkeypatch, capsys
):
    """An error of the harness itself, in the second save."""
    file, saves = tmp_path / "out.json", []
    save = Record.save

    def failing_save(self, **figures):
        saves.append(1)
        if len(saves) == 2:
            raise ArithmeticError("harness")
        save(self, **figures)

    monkeypatch.setattr(Record, "save", failing_save)
    arguments = ["--model", str(tiny_folder), "--slice", "0", "--engines", "plain", "--json", str(file)]
    arguments += ["--tokens", "4"] if command == "token" else ["--seqlen", "12", "--max-batch", "2"]
    with pytest.raises(ArithmeticError, match="harness"):
        main(["bench", command, *arguments])
    content = json.loads(file.read_text())
    assert content["complete"] is False
    assert len(content["rows"]) == 1
    printed = capsys.readouterr()
    assert "This run is incomplete." in printed.out
    assert f"stopped by an error: 1 rows are kept; {file} marked incomplete" in printed.err


def test_run_of_which_nothing_worked_is_an_error(tiny_folder, monkeypatch, capsys):
    def failing(network, batch, length):
        raise broken()

    monkeypatch.setitem(engines_module.ENGINES, "plain", Engine("plain", failing))
    arguments = ["--model", str(tiny_folder), "--slice", "0", "--engines", "plain", "--tokens", "4"]
    assert main(["bench", "token", *arguments]) == 2
    printed = capsys.readouterr()
    assert "dense, plain: not measured (ValueError: no kernel)" in printed.out
    assert "nothing could be measured" in printed.err
