"""The harness on tiny models: what it measures of which network, and what it says when something is wrong."""

import csv
import gc
import json
import weakref

import numpy
import pytest
import torch

from slicegpt.bench.commands.predict import cost_of
from slicegpt.bench.commands.throughput import ThroughputOptions, measure_throughput
from slicegpt.bench.commands.token_time import DecodingRun, TokenOptions, measure_token_times
from slicegpt.bench.harness.comparison import compare, token_ratios
from slicegpt.bench.harness.memory import is_out_of_memory
from slicegpt.bench.harness.record import Record, without_folders
from slicegpt.bench.harness.timing import quantiles
from slicegpt.bench.models import engines as engines_module
from slicegpt.bench.models.architectures import sliced_config
from slicegpt.bench.models.decoders import ForwardDecoder, GenerateDecoder, bytes_read
from slicegpt.bench.models.engines import (
    BenchmarkCase,
    Engine,
    benchmark_cases,
    chosen_engines,
    groups_by_memory,
)
from slicegpt.cli import main
from slicegpt.modeling.sizes import skeleton

CPU = torch.device("cpu")
ALL = ["hf", "hf-eager", "hf-static", "hf-generate", "hf-generate-static", "plain", "fused"]


def token_rows(cases, **options) -> tuple[list[dict], Record]:
    record = Record("token", {}, CPU)
    measure_token_times(
        cases, TokenOptions(**{"tokens": 6, "prompt": 5, "rounds": 2} | options), None, record
    )
    return record.rows, record


# --- pure functions -----------------------------------------------------------------------------------------


def test_quantiles_are_those_of_numpy():
    values = list(numpy.random.default_rng(0).normal(size=37))
    seen = quantiles(values)
    expected = numpy.quantile(values, [0.5, 0.1, 0.9])
    numpy.testing.assert_allclose([seen.median, seen.p10, seen.p90], expected, rtol=1e-12)
    assert quantiles([3.0]) == quantiles([3.0, 3.0])


def test_speedups_are_against_the_best_dense_row_of_the_same_model():
    rows = [
        {"network": n, "engine": e, "slice": s, "dense_parameters": m, "dtype": d, "ms": t}
        for n, e, s, m, d, t in [
            ("dense", "hf", 0.0, 7, "float32", 10.0),
            ("dense", "fused", 0.0, 7, "float32", 8.0),
            ("sliced 25 %", "fused", 0.25, 7, "float32", 4.0),
            ("pruned", "2:4", None, 7, "float32", 2.0),
            ("other", "hf", 0.0, 9, "float32", 1.0),
            ("broken", "hf", 0.25, 9, "float32", None),
            ("dense", "fused", 0.0, 7, "bfloat16", 5.0),
            ("sliced 25 %", "fused", 0.25, 7, "bfloat16", 4.0),
        ]
    ]
    sentence = compare(rows, "ms", smaller_is_better=True)
    assert [row["speedup"] for row in rows] == [0.8, 1.0, 2.0, 4.0, 1.0, None, 1.0, 1.25]
    assert "Best dense baseline: fused (dense, 8; hf 10)" in sentence
    compare(rows, "ms", smaller_is_better=False)
    assert rows[2]["speedup"] == 0.4
    assert compare([rows[2]], "ms", smaller_is_better=True) is None


def test_ratios_of_token_times():
    """By hand: the runtime against the faster cache of `generate()` and all of Hugging Face; slicing beside bytes."""
    rows = [
        {
            "network": n,
            "engine": e,
            "slice": s,
            "dense_parameters": 7,
            "dtype": d,
            "ms_median": t,
            "read_bytes": b,
        }
        for n, e, s, d, t, b in [
            ("dense", "hf-generate", 0.0, "float32", 12.0, 100),
            ("dense", "hf-generate-static", 0.0, "float32", 10.0, 100),
            ("dense", "hf-compile", 0.0, "float32", 9.0, 100),
            ("dense", "fused", 0.0, "float32", 8.0, 100),
            ("sliced 25 %", "plain", 0.25, "float32", 9.0, 80),
            ("sliced 25 %", "fused", 0.25, "float32", 6.4, 80),
            ("dense", "hf", 0.0, "bfloat16", 5.0, 50),
            ("dense", "fused", 0.0, "bfloat16", 4.0, 50),
        ]
    ]
    seen = [(r["comparison"], r["dtype"], r["ratio"], r["bytes_ratio"]) for r in token_ratios(rows)]
    assert seen == [
        ("dense, fused over hf-generate-static", "float32", 1.25, None),
        ("dense, fused over hf-compile", "float32", 1.125, None),
        ("sliced 25 % over dense, fused", "float32", 1.25, 1.25),
        ("dense, fused over hf", "bfloat16", 1.25, None),
    ]
    assert token_ratios(rows[:3]) == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "slicegpt bench token --model /home/me/models/llama-25 --json /tmp/x.json",
            "--model llama-25 --json x.json",
        ),
        ("--calibration /data/a.txt:8,/data/b.txt:1", "--calibration a.txt:8,b.txt:1"),
        ("--model=~/models/x", "--model=x"),
        ("--model meta-llama/Llama-2-7b-hf runs/x", "--model meta-llama/Llama-2-7b-hf runs/x"),
        ("45 GB/s, 1/2", "45 GB/s, 1/2"),
    ],
)
def test_results_name_no_folders_of_this_machine(text, kept):
    assert without_folders(text).endswith(kept)
    assert without_folders({"a": [text]})["a"][0].endswith(kept)


def test_steps_are_shared_out_over_rounds():
    assert TokenOptions(tokens=10, rounds=4).shares() == [3, 3, 2, 2]
    assert TokenOptions(tokens=2, rounds=4).shares() == [1, 1]


@pytest.mark.parametrize(
    ("steps", "timed", "context"), [(None, 123, 5), (8, 8, 60), (1000, 123, 5), (1, 1, 63)]
)
def test_timed_steps_lie_in_the_middle_of_the_sequence(steps, timed, context):
    options = ThroughputOptions(seqlen=128, steps=steps)
    assert (options.timed, options.context, options.length) == (timed, context, 128)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_too_little_memory(error, is_memory):
    assert is_out_of_memory(error) is is_memory


def test_real_failed_allocation_is_recognised():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_bytes_read_are_those_of_the_prediction(fraction):
    config = sliced_config("smollm2-135m", fraction, round_to=8)
    model = skeleton(config).to(torch.float16)
    model.tie_weights()
    # The prediction leaves out what is not a layer or the head: the last norm and a tied model's projection.
    rest = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(("model.norm", "model.embed_proj"))
    )
    assert bytes_read(model) == 2 * (cost_of(config).read_weights + rest)


def test_networks_share_memory_while_they_fit(tiny_networks):
    networks = tiny_networks((0.0, 0.25, 0.5))
    cases, _ = benchmark_cases(networks, chosen_engines(["hf", "plain", "fused"]))
    assert [len(group) for group in groups_by_memory(cases, float("inf"))] == [7]
    dense = 3 * networks[0].bytes
    groups = groups_by_memory(cases, dense + 2 * networks[1].bytes)
    assert [[case.name for case in group] for group in groups] == [
        ["dense, hf", "dense, plain", "dense, fused", "sliced 25 %, plain", "sliced 25 %, fused"],
        ["sliced 50 %, plain", "sliced 50 %, fused"],
    ]
    assert [len(group) for group in groups_by_memory(cases, 0)] == [3, 2, 2]


# --- token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "qwen3-tied"])
def test_every_engine_decodes_every_family(tiny_networks, family):
    cases, skipped = benchmark_cases(tiny_networks(family=family), chosen_engines(ALL))
    rows, record = token_rows(cases, batch=2)
    names = {(row["network"], row["engine"]) for row in rows}
    assert names == {("dense", engine) for engine in ALL} | {
        ("sliced 50 %", "plain"),
        ("sliced 50 %", "fused"),
    }
    assert not skipped
    assert not record.content["skipped"]
    for row in rows:
        assert row["tokens"] == 6
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["tokens_per_second"] == pytest.approx(2000 / row["ms_median"])
        assert row["gpu_ms"] is None
        assert row["prompt_ms"] > 0
        # "bytes" count a dense model's norms, which our forms fold into their neighbours: under 1 % here. The rest of
        # the peak is the resident set's growth, which is nothing where the allocator has pages left.
        assert row["peak_bytes"] >= 0.99 * row["bytes"]
        # Engines with the same weights are one network: they say the same.
        assert row["same_tokens"] == 6
    assert min(row["bytes"] for row in rows) < rows[0]["bytes"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_series_of_generate_calls_are_one_generation(tiny_networks, cache):
    """In pieces and with every token watched, `generate()` says what it says in one call."""
    (network,) = tiny_networks((0.0,))
    model, ids = network.huggingface(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    decoder, calls, said = GenerateDecoder(model, 2, 16, cache=cache), [], []
    decoder.prompt(ids)
    said.append(decoder.tokens)

    def after() -> None:
        calls.append("after")
        said.append(decoder.tokens)

    for _ in range(2):
        decoder.steps(3, after, before=lambda: calls.append("before"))
    decoder.step()
    said.append(decoder.tokens)
    assert calls == ["before", "after"] * 6
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)[:, 3:]
    assert torch.equal(torch.cat(said, dim=1), expected[:, [0, 2, 3, 4, 6, 7, 8, 9]])


def test_several_dtypes_in_one_run(tiny_folder, tmp_path, capsys):
    file = tmp_path / "token.json"
    arguments = [
        "--model",
        str(tiny_folder),
        "--slice",
        "0,0.5",
        "--round-to",
        "8",
        "--engines",
        "hf-generate,fused",
    ]
    arguments += ["--dtype", "float32,bfloat16", "--tokens", "4", "--rounds", "2", "--json", str(file)]
    assert main(["bench", "token", *arguments]) == 0
    content = json.loads(file.read_text())
    assert [(row["network"], row["dtype"], row["engine"]) for row in content["rows"]] == [
        (f"{size}, {dtype}", dtype, engine)
        for dtype in ("float32", "bfloat16")
        for size, engine in (("dense", "hf-generate"), ("dense", "fused"), ("sliced 50 %", "fused"))
    ]
    # Every dtype has its own baseline, and a run of two dtypes half the bytes.
    for half in (content["rows"][:3], content["rows"][3:]):
        assert max(row["speedup"] for row in half if row["slice"] == 0) == 1
    assert content["rows"][3]["bytes"] * 2 == content["rows"][0]["bytes"]
    assert [row["dtype"] for row in content["ratios"]] == ["float32"] * 2 + ["bfloat16"] * 2
    printed = capsys.readouterr().out
    assert "sliced 50 % over dense, fused" in printed
    assert printed.count("Best dense baseline") == 2
    assert str(tiny_folder.parent) not in file.read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "token", "--shape", "llama-1b", "--dtype", "float32,int8"])
    assert "must be among auto, float32, float16, bfloat16, got 'float32,int8'" in capsys.readouterr().err


def test_folder_speaks_the_same_in_hugging_faces_class_and_ours(tiny_folder, tmp_path, capsys):
    file = tmp_path / "token.json"
    arguments = ["--model", str(tiny_folder), "--slice", "0", "--engines", ",".join(ALL), "--json", str(file)]
    assert main(["bench", "token", *arguments, "--tokens", "8", "--prompt", "6", "--csv", f"{file}.csv"]) == 0
    content = json.loads(file.read_text())
    assert content["complete"] is True
    assert [row["engine"] for row in content["rows"]] == ALL
    assert {row["same_tokens"] for row in content["rows"]} == {8}
    assert {"device", "driver", "versions", "commit", "date", "command", "load_average"} <= set(
        content["environment"]
    )
    assert content["settings"]["tokens"] == 8
    assert content["peaks"]["bandwidth"] > 0
    assert all(row["bandwidth_fraction"] > 0 for row in content["rows"])
    with open(f"{file}.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["engine"] for row in rows] == ALL
    where = content["environment"]
    for name, value in {**where, **where["versions"]}.items():
        if name in ("device", "commit", "date", "command", "slicegpt", "python", "torch"):
            assert {row[name] for row in rows} == {value}
    assert float(rows[0]["ms_median"]) == content["rows"][0]["ms_median"]
    printed = capsys.readouterr().out
    best = min(content["rows"], key=lambda row: row["ms_median"])["engine"]
    assert f"Best dense baseline: {best} (dense" in printed


@pytest.mark.parametrize("cold", [False, True])
def test_cold_caches_are_emptied_before_every_timed_step(tiny_networks, monkeypatch, cold):
    flushed = []
    monkeypatch.setattr(
        "slicegpt.bench.commands.token_time.CacheFlush", lambda device: lambda: flushed.append(device)
    )
    cases, _ = benchmark_cases(tiny_networks((0.0,)), chosen_engines(["hf-generate", "fused"]))
    rows, _ = token_rows(cases, cold=cold)
    assert len(flushed) == (sum(row["tokens"] for row in rows) if cold else 0)


def test_a_gpus_time_counts_devices(tiny_networks):
    """GPU-ms: milliseconds times devices, on one GPU as many as were measured; none on a CPU."""
    (network,) = tiny_networks((0.5,))
    decoder = engines_module.start(BenchmarkCase(network, chosen_engines(["plain"])[0]), 1, 8)
    run = DecodingRun(
        BenchmarkCase(network, chosen_engines(["plain"])[0]), decoder, 1.0, 1.0, 0, 0, times=[2.0, 4.0, 3.0]
    )
    assert run.row(TokenOptions(), None)["gpu_ms"] is None
    network.device = torch.device("cuda")
    assert run.row(TokenOptions(), None)["gpu_ms"] == 3.0


def test_compile_that_fails_is_reported_and_the_rest_is_measured(tiny_networks, monkeypatch):
    def failing(network, batch, length):
        raise RuntimeError("InductorError: no kernel\nat all")

    broken = Engine("plain-compile", failing, compiled_on=("cpu",))
    networks = tiny_networks()
    rows, record = token_rows(
        [BenchmarkCase(networks[1], broken), *benchmark_cases(networks, chosen_engines(["plain"]))[0]]
    )
    assert len(rows) == 2
    reason = "RuntimeError: InductorError: no kernel"
    assert record.content["skipped"] == [
        {"network": "sliced 50 %", "engine": "plain-compile", "skipped": reason}
    ]


def test_torch_compile_needs_a_compiler_on_a_cpu(tiny_networks, monkeypatch):
    monkeypatch.setattr(engines_module.shutil, "which", lambda name: None)
    cases, skipped = benchmark_cases(tiny_networks(), chosen_engines(["hf", "hf-compile"]))
    assert [case.name for case in cases] == ["dense, hf"]
    assert skipped[0]["skipped"] == "torch.compile needs a C++ compiler on a CPU"


def test_runtime_that_turns_a_network_down_is_reported(tiny_networks, monkeypatch):
    (network,) = tiny_networks((0.5,))
    network.config.hidden_act = "tanh"
    rows, record = token_rows(benchmark_cases([network], chosen_engines(["plain", "fused"]))[0])
    assert [row["engine"] for row in rows] == ["plain"]
    assert "'tanh' is not supported" in record.content["skipped"][0]["skipped"]


# --- throughput ---------------------------------------------------------------------------------------------


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
