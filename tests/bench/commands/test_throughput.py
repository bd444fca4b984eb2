"""`bench throughput` on tiny models, within a memory limit and beyond what fits."""

import gc
import weakref

import pytest
import torch

from slicegpt.bench.commands.throughput import ThroughputOptions, measure_throughput
from slicegpt.bench.harness.record import Record
from slicegpt.bench.models.decoders import ForwardDecoder
from slicegpt.bench.models.engines import BenchmarkCase, Engine, benchmark_cases, chosen_engines

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("steps", "timed", "context"), [(None, 123, 5), (8, 8, 60), (1000, 123, 5), (1, 1, 63)]
)
def test_timed_steps_lie_in_the_middle_of_the_sequence(steps, timed, context):
    options = ThroughputOptions(seqlen=128, steps=steps)
    assert (options.timed, options.context, options.length) == (timed, context, 128)


def test_throughput_of_a_tiny_model(tiny_networks):
    record = Record("throughput", {}, CPU)
    cases, _ = benchmark_cases(tiny_networks(), chosen_engines(["hf", "fused"]))
    options = ThroughputOptions(seqlen=16, steps=3, max_batch=4, rounds=2, tolerance=0.9)
    measure_throughput(cases, options, record)
    assert [(row["network"], row["engine"]) for row in record.rows] == [
        ("dense", "hf"),
        ("dense", "fused"),
        ("sliced 50 %", "fused"),
    ]
    for row in record.rows:
        points = [
            p
            for p in record.content["points"]
            if (p["network"], p["engine"]) == (row["network"], row["engine"])
        ]
        assert {1, 2} <= {point["batch"] for point in points}
        assert row["stop"] in ("limit", "plateau", "drop")
        assert len(row["rounds"]) == 2
        rates = [point["tokens_per_second"] for point in points] + row["rounds"]
        assert row["tokens_per_second"] == max(rates)
        at_that_batch = [p["tokens_per_second"] for p in points if p["batch"] == row["batch"]]
        assert max(rates) in at_that_batch + row["rounds"]
        assert row["largest_batch"] == max(point["batch"] for point in points)


def test_memory_limit_stops_the_search_before_it_is_passed(tiny_networks):
    record = Record("throughput", {}, CPU)
    (network,) = tiny_networks((0.0,))
    cases, _ = benchmark_cases([network], chosen_engines(["plain"]))
    # Room for some batches' caches: the estimate alone must stop it, whatever the resident set says.
    limit = network.bytes + 40e6
    options = ThroughputOptions(seqlen=64, steps=2, max_memory=limit, rounds=1, tolerance=0.99)
    measure_throughput(cases, options, record)
    (row,) = record.rows
    assert row["stop"] in ("memory", "plateau", "drop")
    assert all(point["peak_bytes"] <= limit for point in record.content["points"])
    tight = ThroughputOptions(seqlen=64, steps=2, max_memory=network.bytes + 1, rounds=1)
    measure_throughput(cases, tight, record)
    (row,) = record.rows
    assert (row["stop"], row["batch"], row["tokens_per_second"]) == ("memory", None, None)
    assert row["reason"].startswith("memory limit: batch 1 would take")


def test_out_of_memory_is_reported_and_leaves_nothing_behind(tiny_networks):
    (network,) = tiny_networks((0.5,))
    held: list[weakref.ref] = []

    class Hungry(ForwardDecoder):
        def fill(self, context: int) -> None:
            block = torch.zeros(1 << 20)
            held.append(weakref.ref(block))
            if self.batch > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().fill(context)

    engine = Engine("hungry", lambda network, batch, length: Hungry(network.canonical(), batch, length))
    record = Record("throughput", {}, CPU)
    options = ThroughputOptions(seqlen=8, steps=1, rounds=1, tolerance=0.99)
    measure_throughput([BenchmarkCase(network, engine)], options, record)
    (row,) = record.rows
    assert row["largest_batch"] <= 4
    assert row["stop"] in ("memory", "plateau")
    gc.collect()
    assert held
    assert not any(reference() is not None for reference in held)
