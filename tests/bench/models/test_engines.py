"""Which networks run on which engines, in which forms, and which of them share memory."""

import pytest
import torch
from support.gguf_files import write_gguf

from slicegpt.bench.commands.token_time import TokenOptions, measure_token_times
from slicegpt.bench.harness.record import Record
from slicegpt.bench.models import engines as engines_module
from slicegpt.bench.models import llama_cpp
from slicegpt.bench.models.engines import benchmark_cases, chosen_engines, groups_by_memory
from slicegpt.bench.models.networks import choose_networks
from slicegpt.conversion.plan import Shape
from slicegpt.errors import SliceGPTError

CPU = torch.device("cpu")


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


def test_torch_compile_needs_a_compiler_on_a_cpu(tiny_networks, monkeypatch):
    monkeypatch.setattr(engines_module.shutil, "which", lambda name: None)
    cases, skipped = benchmark_cases(tiny_networks(), chosen_engines(["hf", "hf-compile"]))
    assert [case.name for case in cases] == ["dense, hf"]
    assert skipped[0]["skipped"] == "torch.compile needs a C++ compiler on a CPU"


def test_forms_that_no_engine_needs_are_given_up(tiny_folder):
    def forms(*engines: str) -> set[str]:
        (network,) = choose_networks([str(tiny_folder)], None, [0.0], [None], CPU, Shape(round_to=8))
        cases, _ = benchmark_cases([network], chosen_engines(list(engines)))
        for case in cases:
            engines_module.start_decoder(case, 1, 8)
        return set(network._models)

    assert forms("fused") == {"runtime"}
    assert forms("fused-int8", "fused", "fused-int4") == {"runtime", "runtime int4", "runtime int8"}
    assert forms("plain", "fused") == {"canonical", "runtime"}
    assert forms("fused", "hf") == {"huggingface", "runtime"}


def test_rows_of_rounded_weights_have_their_own_bytes(tiny_folder):
    networks = choose_networks([str(tiny_folder)], None, [0.0], [None], CPU, Shape(round_to=8))
    cases, _ = benchmark_cases(networks, chosen_engines(["fused", "fused-int8"]))
    record = Record("token", {}, CPU)
    measure_token_times(cases, TokenOptions(2, 3, rounds=1, warmup=1), None, record)
    whole, rounded = record.rows
    assert rounded["bytes"] < 0.5 * whole["bytes"]
    assert (whole["same_tokens"], rounded["same_tokens"]) == (2, 2)


def test_a_gguf_file_is_an_engine(tmp_path, tiny_networks, tiny_tokenizer, monkeypatch):
    pytest.importorskip("gguf")
    networks = tiny_networks()
    model = networks[0].huggingface()
    file = str(write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer))
    for arguments, message in (
        ((["llama-cpp"],), "--engines: llama-cpp needs a GGUF file, --gguf"),
        ((["fused"], [file]), "--gguf: is for the engine llama-cpp, which --engines does not name"),
    ):
        with pytest.raises(SliceGPTError, match=message):
            chosen_engines(*arguments)
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    with pytest.raises(
        SliceGPTError, match="llama-cpp needs the package llama-cpp-python, which is not installed"
    ):
        chosen_engines(["llama-cpp"], [file])
    monkeypatch.setattr(llama_cpp, "is_available", lambda: True)
    with pytest.raises(SliceGPTError, match=r"gguf: must be a GGUF file, got 'none.gguf'"):
        chosen_engines(["llama-cpp"], ["none.gguf"])
    (engine,) = chosen_engines(["llama-cpp"], [file])
    assert engine.name == "llama-cpp f32"
    cases, skipped = benchmark_cases(networks, [engine, *chosen_engines(["fused"])])
    assert [case.name for case in cases] == ["dense, llama-cpp f32", "dense, fused", "sliced 50 %, fused"]
    assert skipped == []
    stored = sum(weight.nbytes for weight in model.parameters())
    facts = llama_cpp.GGUFFacts(file)
    assert facts.stored_bytes == stored
    assert facts.read_bytes == stored - model.get_input_embeddings().weight.nbytes


@pytest.mark.skipif(not llama_cpp.is_available(), reason="llama-cpp-python is not installed")
def test_llama_cpp_chooses_the_tokens_of_the_model(tmp_path, tiny_networks, tiny_tokenizer):
    network = tiny_networks((0.0,), vocab_size=len(tiny_tokenizer))[0]
    model = network.huggingface()
    file = str(write_gguf(tmp_path / "m.gguf", model, tiny_tokenizer))
    (engine,) = chosen_engines(["llama-cpp"], [file])
    decoder, plain = engine.start(network, 1, 20), chosen_engines(["hf"])[0].start(network, 1, 20)
    ids = torch.arange(5)[None] + 7
    for one in (decoder, plain):
        one.prompt(ids)
    for _ in range(4):
        assert int(decoder.tokens) == int(plain.tokens)
        decoder.step()
        plain.step()
