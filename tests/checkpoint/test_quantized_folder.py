"""Sliced folders whose weights have 8 or 4 bits: what they hold, how they load, and what is refused."""

import json

import pytest
import torch
from support.saved_models import save_dense, save_text
from support.tiny_models import token_ids
from transformers import AutoModelForCausalLM

from slicegpt import api
from slicegpt.checkpoint import kept_run
from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.checkpoint.gguf_export import export_gguf
from slicegpt.checkpoint.loading import load_dense
from slicegpt.checkpoint.saving import save_sliced, stored_size
from slicegpt.checkpoint.stock_export import export_stock
from slicegpt.checkpoint.tensors import open_files
from slicegpt.cli.info import describe
from slicegpt.conversion.quantization import describe_storage, is_quantized
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.layerwise import layerwise_losses
from slicegpt.modeling.losses import window_losses
from slicegpt.modeling.quantized import QuantizedWeight
from slicegpt.modeling.sizes import stored_bytes, stored_parameters

pytestmark = pytest.mark.filterwarnings("ignore:the calibration text is small")

SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
COMMON = {"slice": 1 / 3, "neurons": 0.25, "nsamples": 8, "seqlen": 32, "batch_size": 4, "device": "cpu"}
COMMON |= {"timing": False, "keep_state": "never", "dtype": "bfloat16"}
INT4 = {"quantize": "int4", "group_size": 64}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_tokenizer):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_tokenizer, "llama-tied", **SHAPE)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    return save_text(tmp_path_factory.mktemp("text") / "train.txt", documents)


@pytest.fixture(scope="module")
def folder(dense, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("sliced") / "out"
    api.slice(dense, calibration=text, output=output, **COMMON, **INT4)
    return output


def test_what_is_stored(folder):
    """Widths of 64 and 128 columns have groups of 64, one of 96 (the queries' heads) of 32; the table is there once."""
    model, _ = load_dense(str(folder))
    config, files = model.config, open_files([folder / "model.safetensors"])
    assert config.boundary_widths[:-1] == [64] * 4
    layer = model.model.layers[0]
    assert (layer.self_attn.q_proj.group_size, layer.self_attn.o_proj.group_size) == (64, 32)
    assert model.model.embed_tokens.bits == 8
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert not any(name.startswith("lm_head") for name in files)
    names = {name.rpartition(".")[2] for name in files if "_proj." in name}
    assert names == {"weight_packed", "weight_scale", "weight_shape"}
    assert files["model.layers.0.attention_shortcut.factor"].stored == torch.bfloat16
    size = stored_size(folder)
    assert size.bytes == stored_bytes(config, torch.bfloat16)
    facts = describe(str(folder))
    assert (facts["bytes"], facts["parameters"]) == (size.bytes, stored_parameters(config))
    assert facts["stored_as"].startswith(
        "int4 in groups of 64 and 32, embedding and head int8 by row, the rest"
    )
    record = json.loads((folder / "slicing.json").read_text())
    assert record["size"]["bytes"] == size.bytes
    assert record["size"]["parameters"] < record["size"]["dense_parameters"]
    assert size.bytes < 0.5 * 2 * record["size"]["parameters"]


def test_it_loads_and_computes_the_same_everywhere(folder, tmp_path):
    """Loaded; read a layer at a time, dequantised; saved and loaded again; a plain model of the same numbers."""
    model, tokenizer = load_dense(str(folder))
    ids = token_ids(2, 16)
    losses = window_losses(model, ids)
    assert layerwise_losses(open_dense(str(folder)), ids) == losses
    record = json.loads((folder / "slicing.json").read_text())
    again = save_sliced(model, tokenizer, record, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    generated = model.generate(ids[:, :4], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 8)


def test_transformers_loads_it_with_the_library(folder):
    """Its quantizer finds no plain linear layer to replace, and our own layers take the tensors."""
    pytest.importorskip("compressed_tensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours, _ = load_dense(str(folder))
    ids = token_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    packed = [module for module in theirs.modules() if isinstance(module, QuantizedWeight)]
    assert len(packed) == 2 * 7 + 2


def test_the_config_is_the_librarys(folder):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = quantization.QuantizationConfig.model_validate(config)
    schemes = {scheme.weights.group_size: scheme.weights for scheme in read.config_groups.values()}
    assert {size: weights.num_bits for size, weights in schemes.items()} == {64: 4, 32: 4, None: 8}


def test_resumed_to_the_same_bits(dense, text, folder, tmp_path, monkeypatch):
    class Interrupted(BaseException):
        pass

    keep = kept_run.RunKeeper._write

    def limited(self, snapshot):
        keep(self, snapshot)
        if (snapshot.stage, snapshot.done) == ("slicing", 2):
            raise Interrupted

    monkeypatch.setattr(kept_run.RunKeeper, "_write", limited)
    kept = COMMON | INT4 | {"keep_state": "always"}
    with pytest.raises(Interrupted):
        api.slice(dense, calibration=text, output=tmp_path / "out", **kept)
    monkeypatch.setattr(kept_run.RunKeeper, "_write", keep)
    api.slice(output=tmp_path / "out", resume=True, device="cpu", timing=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_target_bytes_count_what_is_stored(dense, text):
    choices = COMMON | {"slice": None, "neurons": None, "target_bytes": 110_000, "quantize": "int8"}
    small = api.slice(dense, calibration=text, **choices).model
    config = small.config
    assert is_quantized(config)
    assert 90_000 < stored_bytes(config, torch.bfloat16) <= 110_000
    assert sum(parameter.nbytes for parameter in small.parameters()) == stored_bytes(config, torch.bfloat16)
    assert describe_storage(config, "bfloat16").startswith("int8 by row")


def test_tables_may_stay_plain(dense, text):
    choices = COMMON | INT4 | {"slice": 0.0, "neurons": 0.0, "zero_points": True, "quantize_tables": False}
    model = api.slice(dense, calibration=text, **choices).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.model.layers[1].mlp.down_proj.weight_zero_point is not None
    assert describe_storage(model.config, "bfloat16").endswith(
        "with zero points, embedding and head bfloat16, the rest bfloat16"
    )


def test_what_needs_plain_numbers_is_refused(folder, tmp_path):
    with pytest.raises(SliceGPTError, match="has weights of 8 or 4 bits; slice without quantize for this"):
        export_stock(folder, tmp_path / "stock")
    with pytest.raises(SliceGPTError, match="has weights of 8 or 4 bits; slice without quantize for this"):
        export_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"quantize": "int3"}, "quantize: must be one of int8, int4, got 'int3'"),
        ({"quantize": "int4", "group_size": 48}, "group_size: must be one of 32, 64, 128, got 48"),
        ({"quantize": "int8", "group_size": 64}, "group_size: is of int4, got 64 with quantize int8"),
        ({"zero_points": True}, "zero_points: is of int4, got True with quantize None"),
        ({"quantize_tables": False}, "quantize_tables: false leaves out what only quantize would store"),
        ({"quantize": "int4", "refit": False}, "quantize: needs the output refit, got int4 without it"),
        (
            {"quantize": "int4", "round_to": 8},
            "quantize: int4 needs whole groups of 32 columns at least, and layers.0.self_attn.q_proj has 40",
        ),
    ],
)
def test_refusals(dense, text, choices, message):
    changes = {"neurons": 0.0} | choices
    if "round_to" in choices:
        changes["slice"] = 0.55
    with pytest.raises(SliceGPTError) as error:
        api.slice(dense, calibration=text, **COMMON | changes)
    assert message in str(error.value)
