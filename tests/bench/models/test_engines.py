"""Which networks run on which engines, in which forms, and which of them share memory."""

import torch

from slicegpt.bench.models import engines as engines_module
from slicegpt.bench.models.engines import benchmark_cases, chosen_engines, groups_by_memory
from slicegpt.bench.models.networks import choose_networks
from slicegpt.conversion.plan import Shape

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
    assert forms("plain", "fused") == {"canonical", "runtime"}
    assert forms("fused", "hf") == {"huggingface", "runtime"}
