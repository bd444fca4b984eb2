"""`bench token` on tiny models: what it measures of which network, and what it reports when an engine fails."""

import csv
import json

import pytest
import torch

from slicegpt.bench.commands.token_time import DecodingRun, TokenOptions, measure_token_times
from slicegpt.bench.harness.record import Record
from slicegpt.bench.models import engines as engines_module
from slicegpt.bench.models.engines import BenchmarkCase, Engine, benchmark_cases, chosen_engines
from slicegpt.cli import main

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick_peaks")
ALL = ["hf", "hf-eager", "hf-static", "hf-generate", "hf-generate-static", "plain", "fused"]


def token_rows(cases, **options) -> tuple[list[dict], Record]:
    record = Record("token", {}, CPU)
    measure_token_times(
        cases, TokenOptions(**{"tokens": 6, "prompt": 5, "rounds": 2} | options), None, record
    )
    return record.rows, record


def test_steps_are_shared_out_over_rounds():
    assert TokenOptions(tokens=10, rounds=4).shares() == [3, 3, 2, 2]
    assert TokenOptions(tokens=2, rounds=4).shares() == [1, 1]


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
    decoder = engines_module.start_decoder(BenchmarkCase(network, chosen_engines(["plain"])[0]), 1, 8)
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


def test_runtime_that_turns_a_network_down_is_reported(tiny_networks, monkeypatch):
    (network,) = tiny_networks((0.5,))
    network.config.hidden_act = "tanh"
    rows, record = token_rows(benchmark_cases([network], chosen_engines(["plain", "fused"]))[0])
    assert [row["engine"] for row in rows] == ["plain"]
    assert "'tanh' is not supported" in record.content["skipped"][0]["skipped"]


def test_trace_of_one_step(tiny_networks, tmp_path):
    """A range a case, in one file; the step is not among those that were timed."""
    cases, _ = benchmark_cases(tiny_networks(), chosen_engines(["hf", "fused"]))
    record, trace = Record("token", {}, CPU), tmp_path / "trace.json"
    options = TokenOptions(tokens=4, prompt=5, rounds=2, traced=True)
    assert options.length == TokenOptions(tokens=4, prompt=5, rounds=2).length + 2
    measure_token_times(cases, options, None, record, trace=str(trace))
    assert [row["tokens"] for row in record.rows] == [4, 4, 4]
    ranges = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    for name in ("dense, hf", "dense, fused", "sliced 50 %, fused"):
        assert f"{name} / step" in ranges
    assert "aten::mm" in ranges or "aten::addmm" in ranges


def test_trace_of_networks_that_take_turns_in_memory(tiny_networks, tmp_path, monkeypatch):
    """Groups are traced one after the other, and written together."""
    monkeypatch.setattr(
        "slicegpt.bench.commands.token_time.groups_by_memory", lambda cases, _: [[c] for c in cases]
    )
    cases, _ = benchmark_cases(tiny_networks(), chosen_engines(["fused"]))
    trace = tmp_path / "trace.json"
    options = TokenOptions(tokens=2, prompt=5, rounds=1, traced=True)
    measure_token_times(cases, options, None, Record("token", {}, CPU), trace=str(trace))
    ranges = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"dense, fused / step", "sliced 50 %, fused / step"} <= ranges
