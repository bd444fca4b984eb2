"""A source gives the tensors of the loaded model, refuses what loading refuses, and holds one tensor at a time."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_folders import edit_config, edit_weights, save_deep, tiny_llama
from support.gguf_files import write_gguf
from support.memory import run_and_measure
from support.tiny_models import CASES, tiny_model

from slicegpt.checkpoint.dense_source import open_dense, source_of
from slicegpt.checkpoint.loading import load_dense
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource, canonical_fields, checkpoint_of


def check_against_loaded(name: object, dtype: torch.dtype | None = None) -> DenseSource:
    """The source of `name`, found equal to what `load_dense` loads, bit for bit."""
    source, (model, tokenizer) = open_dense(str(name), dtype), load_dense(str(name), dtype)
    expected = model.state_dict()
    assert set(source.tensors) == set(expected)
    for key, tensor in expected.items():
        read = source.tensors[key]
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert source.tensors.shape(key) == tensor.shape
        assert tensor.ndim == 0 or torch.equal(source.tensors.rows(key, 1, 3), tensor[1:3])
    assert source.dtype == model.dtype
    assert source.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert source.total_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert source.config.to_dict() == model.config.to_dict()
    assert source.generation_config.to_dict() == model.generation_config.to_dict()
    assert source.tokenizer("some text").input_ids == tokenizer("some text").input_ids
    assert canonical_fields(source) == canonical_fields(model)
    assert checkpoint_of(source).tied == checkpoint_of(model).tied
    # The same tensors under the canonical names, and of a model in memory without copies.
    for own, loaded in ((source, model), (source_of(model), model)):
        last = source.config.num_hidden_layers - 1
        theirs, ours = checkpoint_of(loaded).layer(last), checkpoint_of(own).layer(last)
        if theirs.mixture is not None:
            theirs, ours = (replace(one, **vars(one.mixture.expert(1))) for one in (theirs, ours))
        assert torch.equal(ours.up.weight, theirs.up.weight)
        assert torch.equal(ours.down.weight, theirs.down.weight)
        assert torch.equal(ours.o.weight, theirs.o.weight)
    return source


@pytest.mark.parametrize("case", CASES)
def test_every_family(case, tiny_tokenizer, tmp_path):
    """Sharded, in bfloat16; and read in float32, which a head and a table of 96 rows make several pieces of."""
    tiny_model(case, torch.bfloat16, vocab_size=512).save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not check_against_loaded(tmp_path).in_memory
    check_against_loaded(tmp_path, torch.float32)


def test_one_file_and_a_generation_config_of_its_own(folder):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    assert check_against_loaded(folder).generation_config.temperature == 0.5


def test_a_large_tensor_is_converted_piece_by_piece(folder, monkeypatch):
    monkeypatch.setattr("slicegpt.checkpoint.tensors.PIECE_BYTES", 1000)
    for dtype in (torch.bfloat16, torch.float64):
        check_against_loaded(folder, dtype)


def test_the_stored_dtype_where_the_config_has_none(folder):
    edit_config(folder, dtype=None)
    edit_weights(
        folder, lambda weights: weights.update({name: each.half() for name, each in weights.items()})
    )
    assert check_against_loaded(folder).dtype == torch.float16


@pytest.mark.parametrize("shards", [False, True])
def test_pytorch_files_are_loaded_whole_with_a_note(shards, folder, caplog):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards:
        names = sorted(weights)
        halves = {"one.bin": names[:7], "two.bin": names[7:]}
        for file, part in halves.items():
            torch.save({name: weights[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    source = check_against_loaded(folder)
    assert source.in_memory
    assert [record.getMessage() for record in caplog.records if record.name == "slicegpt"] == [
        f"{folder}: .bin files cannot be read one at a time; the whole model is loaded into memory"
    ]


@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen3-tied", "phi3-long", "starcoder2"])
def test_gguf(case, tiny_tokenizer, tmp_path, monkeypatch):
    """Its rows of queries and keys are reordered, its tensors converted in pieces."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setattr("slicegpt.checkpoint.gguf.PIECE_BYTES", 1000)
    model = tiny_model(case, torch.float32, vocab_size=512)
    file = write_gguf(tmp_path / "model.gguf", model, tiny_tokenizer)
    for dtype in (None, torch.bfloat16):
        assert not check_against_loaded(file, dtype).in_memory


@pytest.mark.model
def test_quantised_gguf():
    """SmolLM2's Q4_1 and Q6_K tensors, each read alone, against the model de-quantised whole."""
    source, (model, _) = open_dense("smollm2-135m"), load_dense("smollm2-135m")
    assert source.parameters == 134_515_008
    for name, tensor in model.state_dict().items():
        if ".layers.0." in name or ".layers." not in name:
            assert torch.equal(source.tensors[name], tensor)
            assert torch.equal(source.tensors.rows(name, 7, 40), tensor[7:40])


# --- names that transformers changes, ties ---


def test_names_of_older_releases_and_of_the_base_model(tiny_tokenizer, tmp_path):
    model = tiny_model("gpt-neox", torch.float32, vocab_size=512)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)

    def rename(weights: dict) -> None:
        head = next(weights.pop(name) for name in ("lm_head.weight", "embed_out.weight") if name in weights)
        bare = {name.removeprefix("gpt_neox."): tensor for name, tensor in weights.items()}
        weights.clear()
        buffer = {"layers.0.attention.masked_bias": torch.tensor(-1e9)}
        weights.update(bare | {"embed_out.weight": head} | buffer)

    edit_weights(tmp_path, rename)
    source = check_against_loaded(tmp_path)
    assert torch.equal(source.tensors["gpt_neox.embed_in.weight"], model.gpt_neox.embed_in.weight)
    assert torch.equal(source.tensors["lm_head.weight"], model.get_output_embeddings().weight)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_the_tied_flag(equal, tiny_tokenizer, tmp_path):
    """Equal ones are one, others two; finding out reads neither of them whole."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    own = table.clone() if equal else table + 1
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": own}))
    source = check_against_loaded(tmp_path)
    assert checkpoint_of(source).tied == equal
    assert torch.equal(source.tensors["lm_head.weight"], own)


def test_nothing_is_read_for_the_fields(sharded, monkeypatch):
    source = open_dense(str(sharded))
    monkeypatch.setattr(type(next(iter(source.tensors.stored.values()))), "read", None)
    assert canonical_fields(source) == canonical_fields(load_dense(str(sharded))[0])


@pytest.mark.parametrize("case", ["phi3-window", "gpt-neox"])
def test_a_fused_projection_is_read_once(case, tiny_tokenizer, tmp_path, monkeypatch):
    tiny_model(case, torch.float32, vocab_size=512).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    source, reads = open_dense(str(tmp_path)), []
    read = type(source.tensors).__getitem__
    monkeypatch.setattr(
        type(source.tensors), "__getitem__", lambda self, name: reads.append(name) or read(self, name)
    )
    checkpoint_of(source).layer(2)
    assert len(reads) == len(set(reads)) > 4


# --- refusals ---


def spoil_shape(folder):
    edit_config(folder, intermediate_size=64)


def spoil_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def spoil_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def spoil_config(folder):
    edit_config(folder, num_key_value_heads=3)


def spoil_kind(folder):
    edit_config(folder, model_type="glm4")


def drop_weight(folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def add_weight(folder):
    edit_weights(
        folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    )


def quantise(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].to(torch.int8)}))


def add_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def break_weights_file(folder):
    (folder / "model.safetensors").unlink()


SPOILERS = (
    spoil_shape,
    spoil_tokenizer,
    spoil_file,
    spoil_config,
    spoil_kind,
    drop_weight,
    add_weight,
    quantise,
    add_adapter,
    break_weights_file,
)


@pytest.mark.parametrize("spoil", SPOILERS)
def test_what_loading_refuses(spoil, folder):
    spoil(folder)
    messages = []
    for open_it in (load_dense, open_dense):
        with pytest.raises(SliceGPTError) as error:
            open_it(str(folder), sliceable=True)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["", "./absent/model", "someone/no-such-model"])
def test_names_that_loading_refuses(name):
    messages = []
    for open_it in (load_dense, open_dense):
        with pytest.raises(SliceGPTError) as error:
            open_it(name)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_file_that_changes_after_it_was_opened(folder):
    source = open_dense(str(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(SliceGPTError, match="is shorter than it was when it was opened"):
        dict(source.tensors)
    file.unlink()
    with pytest.raises(SliceGPTError, match="cannot be read any more: No such file"):
        dict(source.tensors)


# --- memory ---

MEASURE = """
import sys, torch
from slicegpt.bench.harness.memory import peak_bytes
from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.families import checkpoint_of

source = open_dense(sys.argv[1])
peak = lambda: peak_bytes(torch.device("cpu"))
checkpoint = checkpoint_of(source)
checkpoint.layer(0)
before = peak()
for index in range(1, source.config.num_hidden_layers):
    checkpoint.layer(index)
print(before, peak(), source.total_bytes)
"""


def test_memory_does_not_grow_with_the_layers(tiny_tokenizer, tmp_path):
    """16 layers of 29 MB each: reading all of them after the first raises the peak by one more layer at most (the
    allocator may keep the pages of the one before), where a mapped file would keep all of its 236 MB resident."""
    layer = save_deep(tmp_path, tiny_tokenizer, 16)
    before, after, total = run_and_measure(MEASURE, str(tmp_path))
    assert total > 230e6
    assert after - before <= 1.25 * layer
