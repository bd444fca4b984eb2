"""vLLM's tokens are our `generate`'s: dense and sliced, on one rank, with tensor and with pipeline parallelism.

Run by `make test-vllm`, in an environment of its own; float32, greedy, on the CPU. A greedy token is the same unless
two logits lie within rounding of each other (about 1e-4 here), which none of these prompts comes to.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import LONG_ROPE, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slicegpt.calibration import CalibrationBatch, load_documents, sample_batches
from slicegpt.checkpoint.stock_model import load_stock, stock_of
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.families import canonical_fields, checkpoint_of, source_of
from slicegpt.slicing import SlicingOptions, slice_model

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (make test-vllm)"),
    pytest.mark.slow,
]

WORKER = Path(__file__).parents[1] / "support" / "vllm_worker.py"
NEW_TOKENS = 32
PARALLEL = {"one rank": (1, 1), "tensor parallel": (2, 1), "pipeline parallel": (1, 2)}
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "The for statement is used to",
    "def fibonacci(n):",
    "Water boils at",
    "A list of three fruits:",
    "The president of the United States",
    "In the beginning",
    "The opposite of hot is",
    "To make bread, you need",
    "An integer is",
    "The sun rises in the",
    "Shakespeare wrote",
    "The quick brown fox",
    "Dear Sir or Madam,",
    "The largest planet of the solar system is",
]


def vllm_tokens(
    folders: list[Path], prompts: list[list[int]], ranks: tuple[int, int], work: Path, traced: bool = False
) -> tuple[dict, str]:
    """Tokens per folder, `{folder: [tokens]}`, and what vLLM logged.

    Args:
        traced: vLLM runs the graph that it traces, without compiling it: as everywhere but in eager mode.
    """
    engine = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": len(prompts),
        "enforce_eager": True,
        "tensor_parallel_size": ranks[0],
        "pipeline_parallel_size": ranks[1],
    }
    # vLLM 0.32 on a CPU makes a pipeline stage's buffers while it warms up, which eager mode leaves out.
    if traced or ranks[1] > 1:
        engine |= {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    models = [str(folder) for folder in folders]
    job = {"models": models, "prompts": prompts, "max_tokens": NEW_TOKENS, "engine": engine}
    (work / "job.json").write_text(json.dumps(job))
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks may share two cores
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",  # tells what was fused
    }
    command = [sys.executable, str(WORKER), str(work / "job.json"), str(work / "result.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((work / "result.json").read_text()), done.stdout + done.stderr


@torch.no_grad()
def generated_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers' `generate` on our network, prompt by prompt: no padding, all in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    outputs = [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :] for ids in prompts]
    return [output.tolist() for output in outputs]


def with_more_heads(model: LlamaForCausalLM, heads: int, key_heads: int) -> LlamaForCausalLM:
    """The same function with heads of zeros added: SmolLM2's nine heads cannot be split between two ranks."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    head_dim = config.hidden_size // config.num_attention_heads
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = head_dim, heads, key_heads
    wider = LlamaForCausalLM(config).eval()
    state = model.state_dict()
    for name, target in wider.state_dict().items():
        source = state[name]
        target.zero_()
        target[tuple(slice(size) for size in source.shape)] = source
    return wider


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory) -> dict[str, Path]:
    """SmolLM2-135M with twelve heads: dense (full width, our network), compact, dense shortcuts, varying widths."""
    root, (model, tokenizer) = tmp_path_factory.mktemp("trained"), smollm2
    wider = with_more_heads(model, 12, 4)
    ids = tokenizer("The same function", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(wider(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-3)
    fields = canonical_fields(wider)
    batches = sample_batches(load_documents("python-reference", "train"), tokenizer, 8, 256)
    narrow = constant_widths(fields, 432)
    varying = [(448, 480, 512, 432, 464, 496)[boundary % 6] for boundary in range(len(narrow) - 1)]
    plans = {
        "dense": plan(fields, constant_widths(fields, 576), Shape()),
        "compact": plan(fields, narrow, Shape()),
        "dense shortcuts": plan(fields, narrow, Shape("dense")),
        "varying widths": plan(fields, [*varying, narrow[-1]], Shape()),
    }
    for name, config in plans.items():
        sliced, _ = slice_model(wider, config, batches, SlicingOptions())
        sliced.save_pretrained(root / name)
    return {name: root / name for name in plans}


@pytest.fixture(scope="module")
def prompts(smollm2) -> list[list[int]]:
    return [smollm2[1](text).input_ids for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(trained, prompts) -> dict[str, list[list[int]]]:
    return {name: generated_tokens(folder, prompts) for name, folder in trained.items()}


@pytest.fixture(scope="module", params=PARALLEL)
def served(request, trained, prompts, tmp_path_factory) -> tuple[dict, str]:
    ranks, work = PARALLEL[request.param], tmp_path_factory.mktemp("run")
    results, log = vllm_tokens([*trained.values()], prompts, ranks, work)
    return {name: results[str(folder)] for name, folder in trained.items()}, log


@pytest.mark.model
@pytest.mark.parametrize("name", ["dense", "compact", "dense shortcuts", "varying widths"])
def test_tokens_are_those_of_generate(served, expected, name):
    assert len({tuple(tokens) for tokens in expected[name]}) > len(PROMPTS) // 2  # they depend on the prompt
    assert served[0][name] == expected[name]


@pytest.mark.model
def test_projections_and_norms_are_fused(served, request):
    """vLLM's first worker says what it made of our modules; an unfused one would be left out of these lines."""
    lines = [
        "q_proj + k_proj + v_proj (self_attn: SlicedAttention) -> qkv_proj (QKVParallelLinear)",
        "gate_proj + up_proj (mlp: SlicedGatedMLP) -> gate_up_proj (MergedColumnParallelLinear)",
        "input_norm (WeightlessRMSNorm) -> RMSNorm (CustomOp)",
        "mlp_norm (WeightlessRMSNorm) -> RMSNorm (CustomOp)",
    ]
    if "pipeline" not in request.node.name:  # there the final norm is the last worker's
        lines.append("norm (FinalNorm) -> RMSNorm (CustomOp)")
    for fused in lines:
        assert f"Fused: {fused}" in served[1]


# Families whose parts the trained model lacks: learned positions and shifts (OPT), parallel blocks and a biased head
# (Phi), norms of queries and keys (Qwen3), a window (Mistral), a layer without rotary positions (SmolLM3), and a sliced
# head. Heads of 32, which vLLM can do.
SHAPES = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 128}
SMALL = {
    "opt": {"changes": SHAPES},
    "opt, sliced head": {"case": "opt", "changes": SHAPES, "slice_head": True},
    "phi": {"changes": SHAPES},
    "qwen3-tied": {"changes": SHAPES | {"head_dim": 32}},
    "mistral-window": {"changes": SHAPES | {"head_dim": 32}},
    "smollm3": {"changes": SHAPES},
}
# Families that normalise what their blocks write: capped scores and logits, rotary settings by kind of layer, norms of
# queries and keys over all heads.
NORMS_BEHIND = {
    "gemma2": {"changes": SHAPES | {"head_dim": 32}},
    "gemma3": {"changes": SHAPES | {"head_dim": 32}},
    "olmo2": {"changes": SHAPES},
}
# Mixtures of experts: both kinds of routers, groups and a correction, shared experts, biases, sinks in attention.
EXPERTS = {
    "mixtral": {"changes": SHAPES},
    "qwen2-moe": {"changes": SHAPES, "neurons": 0.25},
    "glm4-moe": {"changes": SHAPES | {"head_dim": 32}},
    "gpt-oss": {"changes": SHAPES | {"head_dim": 32}, "neurons": 0.25},
}
# Sinks in attention, and a rotary base of each layer's own: one has no positions at all.
SINKS = {"granite-swa": {"changes": SHAPES}}
# Layers with fewer key/value groups, fewer query heads in each, or without attention; with a window in some of them.
DELETED_HEADS = {
    "llama": {"changes": SHAPES, "kv_groups": (2, 0, 1), "group_heads": (1, 2, 2)},
    "granite-swa, fewer heads": {"case": "granite-swa", "changes": SHAPES, "kv_groups": (1, 2, 1)},
}
# Families whose factors are folded, and LongRoPE.
FOLDED = {
    "gemma": {"changes": SHAPES | {"head_dim": 32}},
    "granite-tied": {"changes": SHAPES},
    "gpt-neox": {"changes": SHAPES},
    "cohere": {"changes": SHAPES},
    # Prompts beyond the original length: the long factors, which vLLM takes for sequences of all lengths.
    "phi3-long": {
        "changes": SHAPES
        | {
            "rope_parameters": LONG_ROPE
            | {
                "short_factor": [1.0] * 16,
                "long_factor": [2.0 + 0.1 * pair for pair in range(16)],
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 16,
        }
    },
}


def sliced_folders(root: Path, cases: dict[str, dict]) -> dict[str, Path]:
    for name, settings in cases.items():
        model = tiny_model(settings.get("case", name), torch.float32, **settings["changes"])
        fields, head = canonical_fields(model), settings.get("slice_head", False)
        ids = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(0))
        width, neurons = (128, 0.3) if fields.get("post_norm") else (96, settings.get("neurons", 0.0))
        heads = {name: settings.get(name) for name in ("kv_groups", "group_heads")}
        shape = Shape(slice_head=head, neurons=neurons, round_to=8, **heads)
        config = plan(fields, constant_widths(fields, width, head), shape)
        sliced, _ = slice_model(
            model, config, [CalibrationBatch(ids, torch.ones_like(ids))], SlicingOptions()
        )
        sliced.save_pretrained(root / name)
    return {name: root / name for name in cases}


def check_tokens(folders: dict[str, Path], ranks: str, work: Path, traced: bool = False) -> None:
    prompts = torch.randint(3, 96, (8, 20), generator=torch.Generator().manual_seed(1)).tolist()
    results, _ = vllm_tokens([*folders.values()], prompts, PARALLEL[ranks], work, traced)
    for name, folder in folders.items():
        assert results[str(folder)] == generated_tokens(folder, prompts), name


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Path]:
    return sliced_folders(tmp_path_factory.mktemp("small"), SMALL)


@pytest.mark.parametrize("ranks", ["tensor parallel", "pipeline parallel"])
def test_every_family_on_two_ranks(small, ranks, tmp_path):
    check_tokens(small, ranks, tmp_path)


def test_families_whose_factors_are_folded(tmp_path):
    check_tokens(sliced_folders(tmp_path, FOLDED), "one rank", tmp_path)


def test_families_with_norms_behind_their_blocks(tmp_path):
    check_tokens(sliced_folders(tmp_path, NORMS_BEHIND), "one rank", tmp_path)


def test_mixtures_of_experts_and_sinks(tmp_path):
    """In the graph that vLLM traces once, for any number of rows that an expert may have."""
    check_tokens(sliced_folders(tmp_path, EXPERTS | SINKS), "one rank", tmp_path, traced=True)


def test_experts_and_sinks_with_tensor_parallelism(tmp_path):
    """Experts are on every rank, their shared one and attention shared out, sinks with its heads."""
    cases = {name: EXPERTS[name] for name in ("qwen2-moe", "gpt-oss")}
    check_tokens(sliced_folders(tmp_path, cases), "tensor parallel", tmp_path)


@pytest.fixture(scope="module")
def fewer_heads(tmp_path_factory) -> dict[str, Path]:
    return sliced_folders(tmp_path_factory.mktemp("heads"), DELETED_HEADS)


@pytest.mark.parametrize("ranks", PARALLEL)
def test_layers_with_fewer_heads_or_none(fewer_heads, ranks, tmp_path):
    check_tokens(fewer_heads, ranks, tmp_path)


# The stock form runs on vLLM's own classes: case, width of 128 and neurons of 80 that remain, changes.
STOCK = {
    "llama": (96, 64, SHAPES | {"head_dim": 32}),
    "mistral-window": (96, 64, SHAPES | {"head_dim": 32, "sliding_window": None}),
    "qwen2": (128, 64, SHAPES | {"use_sliding_window": False, "sliding_window": None}),
    "qwen3-tied": (128, 64, SHAPES | {"head_dim": 32}),
    "opt": (128, 64, SHAPES),
}


def test_the_stock_form_runs_on_classes_of_vllm(tmp_path):
    folders = {}
    for name, (width, neurons, changes) in STOCK.items():
        model = tiny_model(name, torch.float32, **changes)
        fields = canonical_fields(model)
        shape = Shape(form="stock", round_to=8)
        config = plan(fields, constant_widths(fields, width, True), shape, neurons)
        ids = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(0))
        calibration = [CalibrationBatch(ids, torch.ones_like(ids))]
        sliced, _ = slice_model(model, config, calibration, SlicingOptions(allocate="uniform"))
        stock = load_stock(stock_of(source_of(sliced), checkpoint_of(model)), torch.float32, None)
        folders[name] = tmp_path / name
        stock.save_pretrained(folders[name])
    prompts = torch.randint(3, 96, (8, 20), generator=torch.Generator().manual_seed(1)).tolist()
    results, log = vllm_tokens([*folders.values()], prompts, (1, 1), tmp_path)
    assert "TransformersForCausalLM" not in log  # vLLM's class for what it has none of its own for
    for name, folder in folders.items():
        assert results[str(folder)] == generated_tokens(folder, prompts), name
