"""The pieces of a layer: they are the layer, in every form and for every family, and their names say what they are."""

import json

import pytest
import torch

from slicegpt.bench.commands import layer_ops
from slicegpt.bench.commands.layer_ops import one_layer, prune_2_4, reason_against_2_4
from slicegpt.bench.commands.layers import LayersOptions, check, measure_layers, variants_of, write_trace
from slicegpt.bench.harness.display import notes
from slicegpt.bench.harness.record import Record
from slicegpt.errors import SliceGPTError
from slicegpt.modeling.sizes import decoder_parameters

CPU = torch.device("cpu")
OPTIONS = LayersOptions(batch=2, seqlen=12, repeats=2)
LLAMA = ["attention norm", "q", "k", "v", "attention", "out", "attention shortcut"]
LLAMA += ["MLP norm", "gate", "up", "activation", "down", "MLP shortcut"]
FUSED = [
    "norm + q + k + v",
    "attention",
    "out + shortcut",
    "norm + gate + up + activation",
    "down + shortcut",
]


@pytest.mark.parametrize("shortcut", ["compact", "dense"])
@pytest.mark.parametrize("family", ["llama", "llama-biased", "mistral-window", "qwen3-tied", "opt", "phi"])
def test_operations_in_order_are_the_layer(tiny_networks, family, shortcut):
    variants, skipped = variants_of(tiny_networks((0.0, 0.25), family, shortcut), OPTIONS)
    assert [variant.engine for variant in variants] == ["unfused", "fused"] * 2
    assert [row["engine"] for row in skipped] == ["2:4"]
    for variant in variants:
        check(variant.make())  # the fused one against the plain module


def test_check_sees_a_wrong_operation(tiny_networks):
    variants, _ = variants_of(tiny_networks((0.0,)), OPTIONS)
    run = variants[0].make()
    del run.operations[5]  # out
    run.state["out"] = torch.zeros_like(run.state["stream"])
    with pytest.raises(SliceGPTError, match="dense, unfused: the operations differ from the layer"):
        check(run)


def test_one_layer_has_the_layer_of_the_model(tiny_networks):
    for family, shortcut in (("llama-tied", "compact"), ("phi", "dense")):
        (network,) = tiny_networks((0.25,), family, shortcut, num_hidden_layers=1)
        (deep,) = tiny_networks((0.25,), family, shortcut, num_hidden_layers=4)
        config = one_layer(deep.config)
        # The last boundary of the model is wider; that of a layer in its middle is not.
        blocks = len(config.shortcuts)
        assert config.boundary_widths == [network.config.boundary_widths[0]] * (blocks + 1)
        assert decoder_parameters(config) < decoder_parameters(network.config)


def test_rows_name_the_operations_and_add_them_up(tiny_networks, tmp_path):
    record, trace = Record("layers", {}, CPU), tmp_path / "trace.json"
    measure_layers(tiny_networks(), OPTIONS, record, trace=str(trace))
    rows = {row["variant"]: row for row in record.rows}
    names = ["Hugging Face", "unfused", "fused"]
    assert list(rows) == [*(f"dense, {name}" for name in names), "sliced 50 %, unfused", "sliced 50 %, fused"]
    assert list(rows["dense, unfused"]["operations"]) == LLAMA
    assert list(rows["sliced 50 %, fused"]["operations"]) == FUSED
    assert rows["dense, Hugging Face"]["layer_ms"] > 0
    for name, row in rows.items():
        if "Hugging" in name:
            continue
        assert row["total_ms"] == pytest.approx(sum(row["operations"].values()))
        assert row["difference"] == pytest.approx(row["total_ms"] / row["layer_ms"] - 1)
        assert row["agrees"] == (abs(row["difference"]) <= 0.1)
        shortcuts = [time for operation, time in row["operations"].items() if operation.endswith(" shortcut")]
        fused = row["engine"] == "fused"
        assert row["shortcut_ms"] == (None if fused else pytest.approx(sum(shortcuts)))
    assert "this is a CPU" in record.content["skipped"][0]["skipped"]
    ranges = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"dense, unfused / gate", "sliced 50 %, fused / out + shortcut"} <= ranges


def test_sparse_library_that_turns_a_shape_down_is_reported(tiny_networks, monkeypatch):
    def refuse(*_):
        raise RuntimeError("shape not supported\nat all")

    monkeypatch.setattr(layer_ops, "reason_against_2_4", lambda dtype, device: None)
    monkeypatch.setattr(layer_ops, "sparse_2_4", refuse)
    record = Record("layers", {}, CPU)
    measure_layers(tiny_networks((0.0,)), OPTIONS, record)
    assert [row["engine"] for row in record.rows] == ["hf", "unfused", "fused"]
    assert record.content["skipped"] == [
        {"network": "dense", "engine": "2:4", "skipped": "shape not supported"}
    ]


def test_library_of_the_sparse_products_is_recorded(tiny_networks, monkeypatch):
    """A CPU has none: dense weights of a class that is called so."""

    class Pretended(torch.Tensor):
        pass

    made = []

    def pretend(weight):
        made.append(weight)
        return weight.as_subclass(Pretended)

    monkeypatch.setattr(layer_ops, "reason_against_2_4", lambda dtype, device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pretend)
    record = Record("layers", {}, CPU)
    measure_layers(tiny_networks((0.0,)), OPTIONS, record)
    assert {row["engine"]: row.get("library") for row in record.rows} == {
        "hf": None,
        "unfused": None,
        "fused": None,
        "2:4": "Pretended",
    }
    assert len(made) == 7
    assert "2:4 sparse products by Pretended." in notes(record.content)
    assert layer_ops.sparse_library(torch.sparse.SparseSemiStructuredTensorCUSPARSELT) == "cuSPARSELt"
    assert layer_ops.sparse_library(torch.sparse.SparseSemiStructuredTensorCUTLASS) == "CUTLASS"


def test_trace_replaces_a_file(tiny_networks, tmp_path):
    variants, _ = variants_of(tiny_networks((0.0,)), OPTIONS)
    file = tmp_path / "trace.json"
    file.write_text("old")
    write_trace([variants[0].make()], CPU, str(file))
    assert json.loads(file.read_text())["traceEvents"]


def test_pruning_keeps_the_two_largest_of_four():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, 0.1, -0.2, 0.3]])
    expected = torch.tensor([[0.0, -4.0, 3.0, 0.0, 0.5, 0.0, 0.0, 0.3]])
    assert torch.equal(prune_2_4(weight), expected)
    random = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal((prune_2_4(random).unflatten(1, (-1, 4)) != 0).sum(dim=2), torch.full((32, 16), 2))


def test_2_4_says_what_it_needs(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in reason_against_2_4(torch.float16, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "not float32" in reason_against_2_4(torch.float32, gpu)
    assert reason_against_2_4(torch.bfloat16, gpu) is None
