"""The sliced model in Hugging Face's tools: Trainer, pipeline, continuous batching, device maps, tensor parallelism."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.sliced_models import sliced
from support.tiny_models import relative_error, tiny_model, token_ids
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments, pipeline

WORKER = Path(__file__).parents[1] / "support" / "tensor_parallel_worker.py"


def small_model(case: str = "llama-tied", **changes):
    return sliced(tiny_model(case, torch.float32, **changes), 36, dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_trainer_lowers_the_loss(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(16, 12)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = small_model()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters(), strict=True))


def test_pipeline_generates_what_generate_does(tiny_tokenizer):
    model = small_model(vocab_size=512)
    prompt = "The for statement"
    generate = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    text = generate(prompt, max_new_tokens=8, do_sample=False, return_full_text=True)[0]["generated_text"]
    inputs = tiny_tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert text == tiny_tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize("case", ["llama-tied", "mistral-window", "phi"])
def test_continuous_batching(case):
    """`generate_batch` interleaves requests of unequal length; each gets the tokens it gets alone."""
    from transformers import ContinuousBatchingConfig

    model = small_model(case)
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 5, 12, 7)]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32)
    outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching)
    got = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert got[tuple(prompt)] == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_device_map_auto(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    ids = token_ids()
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert relative_error(placed(ids).logits.cpu(), model(ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-tied", "opt", "phi"])
def test_offload_to_disk(case, tmp_path):
    """Layers that find no room wait on the disk, and the logits stay the same."""
    pytest.importorskip("accelerate")
    model = small_model(case)
    model.save_pretrained(tmp_path)
    ids = token_ids()
    layers = {f"model.layers.{index}": "disk" for index in range(1, model.config.num_hidden_layers)}
    rest = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    device_map = {f"model.{name}": place for name, place in rest.items()} | {"lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu"} | layers
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert all(parameter.is_meta for parameter in placed.model.layers[1].parameters())
    assert torch.equal(placed(ids).logits, model(ids).logits)


def test_no_layer_is_split_between_devices(model):
    """A block's stream must not change devices within it: accelerate keeps these classes whole."""
    kept = set(model._no_split_modules)
    assert {type(layer).__name__ for layer in model.model.layers} <= kept
    assert type(small_model("phi").model.layers[0]).__name__ in kept


def is_replicated(name: str) -> bool:
    """Whether every rank holds the parameter whole: shortcuts and the norms of queries and keys."""
    return "shortcut" in name or "_norm." in name


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux")
def test_tensor_parallelism_by_the_plan(tmp_path):
    """Two processes under torchrun hold a half of the heads and of the MLP each; their logits are the whole model's."""
    folders = []
    for case in ("llama-tied", "llama-biased", "opt", "phi", "qwen3-tied"):
        model, folder = small_model(case), tmp_path / case
        model.save_pretrained(folder)
        ids = token_ids()
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        whole = {
            name: each for name, each in model.named_parameters() if each.numel() and is_replicated(name)
        }
        gradients = {name: parameter.grad for name, parameter in whole.items()}
        torch.save((ids, outputs.logits.detach(), gradients), folder / "expected.pt")
        folders.append(str(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*torchrun, "--master_port", str(port), str(WORKER), *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("equal") == len(folders)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied", "opt", "phi"])
def test_the_tensor_parallel_plan_names_what_is_there(case, tmp_path):
    model = small_model(case)
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names
    gated = any("gate_proj" in name for name in names)
    assert ("layers.*.mlp.gate_proj" in model.config.base_model_tp_plan) == gated
    model.config.save_pretrained(tmp_path)
    assert "base_model_tp_plan" not in (tmp_path / "config.json").read_text()
