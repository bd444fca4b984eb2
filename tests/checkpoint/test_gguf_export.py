"""GGUF files of models without shortcuts: read back by two readers, and run by llama.cpp where it is installed."""

import importlib.util

import pytest
import torch
from support.sliced_models import batches
from support.tiny_models import LLAMA3_ROPE, relative_error, tiny_model
from transformers import AutoTokenizer

from slicegpt.checkpoint.gguf_export import export_gguf
from slicegpt.checkpoint.gguf_tokenizer import pre_tokenizer_name
from slicegpt.checkpoint.loading import load_dense
from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, slice_model

gguf = pytest.importorskip("gguf")
IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python"
)


def folder_of(path, case, tokenizer, sliced=None, **changes):
    """A dense model in a folder, in float32; or, of `sliced` (width, neurons, key/value heads), a sliced one."""
    # Some of the classes of tokenizers bring a token of their own.
    model = tiny_model(case, torch.float32, vocab_size=len(tokenizer) + 8, **changes)
    if sliced is not None:
        width, neurons, groups = sliced
        fields, shape = canonical_fields(model), Shape(form="per-layer", round_to=4)
        config = plan(fields, constant_widths(fields, width, True), shape, neurons, groups)
        options = SlicingOptions(ridge=0.3, allocate="uniform")
        model, _ = slice_model(model, config, batches(2), options)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def own_tokenizer(root):
    """The folder's: some of transformers' classes cut words in their own way, whatever the file says."""
    return AutoTokenizer.from_pretrained(root / "model")


# Case; width, neurons and key/value heads of a sliced one; changes of the dense config.
GRAPHS = {
    "llama": ("llama", None, {}),
    "llama-rope": ("llama-3", None, {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", None, {"use_sliding_window": False, "sliding_window": None}),
    "qwen3": ("qwen3-tied", None, {}),
    "narrow": ("qwen2", (40, 64, None), {"use_sliding_window": False, "sliding_window": None}),
    "deci": ("llama-tied", (48, [64, 80, 32], [2, 1, 2]), {}),
    "granite": ("granite-tied", None, {}),
}
ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen3", "deci": "deci"}


@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != "deci"])
def test_it_reads_back_as_the_same_network(graph, tmp_path, tiny_tokenizer):
    """float32 throughout; two networks that sum in another order, as in tests/runtime: 1e-5 of the logits."""
    case, sliced, changes = GRAPHS[graph]
    model = folder_of(tmp_path / "model", case, tiny_tokenizer, sliced, **changes)
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    assert architecture == ARCHITECTURE.get(graph, "llama")
    assert reader.fields[f"{architecture}.attention.key_length"].contents() == (
        getattr(model.config, "head_dim", None) or 12
    )
    loaded, tokenizer = load_dense(str(file))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, model(ids).logits) < 1e-5
    text = "The for statement, 12345 times"
    expected = own_tokenizer(tmp_path)(text, add_special_tokens=False).input_ids
    assert tokenizer(text, add_special_tokens=False).input_ids == expected


def test_layers_of_their_own_sizes(tmp_path, tiny_tokenizer):
    folder_of(tmp_path / "model", "llama-tied", tiny_tokenizer, (48, [64, 80, 32], [2, 1, 2]))
    reader = gguf.GGUFReader(export_gguf(tmp_path / "model", tmp_path / "model.gguf", "bf16"))
    assert reader.fields["general.architecture"].contents() == "deci"
    assert reader.fields["deci.feed_forward_length"].contents() == [64, 80, 32]
    assert reader.fields["deci.attention.head_count_kv"].contents() == [2, 1, 2]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.2.ffn_down.weight"] == (32, 48)  # GGUF counts dimensions from the last one
    assert "output.weight" not in shapes


@needs_llama_cpp
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 4e-3)])
def test_llama_cpp_computes_the_same_logits(graph, kind, tolerance, tmp_path, tiny_tokenizer):
    """In float32 up to the order of sums. With f16 llama.cpp rounds weights and activations to 11 bits, half of 2^-10
    each at most and at random: of a layer's seven products in a row and three layers, sqrt(2 * 21) 2^-11 / sqrt(3) is
    1.8e-3 of what they add to the stream; twice that."""
    import llama_cpp

    case, sliced, changes = GRAPHS[graph]
    model = folder_of(tmp_path / "model", case, tiny_tokenizer, sliced, **changes)
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)
    engine = llama_cpp.Llama(
        str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    engine.eval(IDS)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    assert relative_error(torch.from_numpy(engine.scores[: len(IDS)].copy()), expected) < tolerance
    text = "The for statement, 123"
    expected = own_tokenizer(tmp_path)(text, add_special_tokens=False).input_ids
    assert engine.tokenize(text.encode(), add_bos=False) == expected


@needs_llama_cpp
def test_its_quantiser(tmp_path, tiny_tokenizer):
    folder_of(tmp_path / "model", "llama", tiny_tokenizer, hidden_size=64, intermediate_size=96)
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert not list(tmp_path.glob(".model*"))
    import llama_cpp

    llama_cpp.Llama(str(file), n_ctx=8, verbose=False)  # logs as before


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("opt", "opt: llama.cpp's graph has no place for what LayerNorms"),
        ("olmo", "olmo: llama.cpp's graph has no LayerNorms"),
        ("phi", "phi: llama.cpp's graph has no place for attention and MLP in parallel"),
        ("mistral-window", "mistral: llama.cpp's graph has no sliding window, this model's is 5 tokens"),
        ("gemma", "gemma: llama.cpp's graph has no MLP other than a SiLU-gated one"),
        ("smollm3", "smollm3: llama.cpp's graph has no layers without rotary positions"),
        ("hunyuan", "norms of queries and keys behind their rotation"),
        ("phi3-long", "rotary positions of type longrope"),
        ("mixtral", "mixtral: llama.cpp's graph has no mixtures of experts that this export writes"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(case, message, tmp_path, tiny_tokenizer):
    folder_of(tmp_path / "model", case, tiny_tokenizer)
    with pytest.raises(SliceGPTError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_arguments(tmp_path, tiny_tokenizer, monkeypatch):
    model = tiny_model("llama", torch.float32, vocab_size=len(tiny_tokenizer))
    fields = canonical_fields(model)
    compact, _ = slice_model(
        model,
        plan(fields, constant_widths(fields, 40)),
        options=SlicingOptions(refit=False, orientation="aligned"),
        batches=batches(1),
    )
    compact.save_pretrained(tmp_path / "compact")
    tiny_tokenizer.save_pretrained(tmp_path / "compact")
    (tmp_path / "there.gguf").write_text("kept")
    for arguments, message in (
        ((tmp_path / "compact", tmp_path / "new.gguf"), "has no shortcuts.*slice with --form stock"),
        ((tmp_path / "compact", tmp_path / "there.gguf"), "gguf: .*there.gguf exists already"),
        ((tmp_path / "compact", tmp_path / "new.gguf", "q9"), "type: must be one of f32, .*got 'q9'"),
        ((tmp_path / "compact", tmp_path), "is a folder, expected a file"),
    ):
        with pytest.raises(SliceGPTError, match=message):
            export_gguf(*arguments)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find_spec(name)
    )
    with pytest.raises(SliceGPTError, match=r"type: q4_k_m is quantised by llama.cpp itself.*pip install"):
        export_gguf(tmp_path / "compact", tmp_path / "new.gguf", "q4_k_m")
    assert (tmp_path / "there.gguf").read_text() == "kept"


def test_names_of_pre_tokenizers(tiny_tokenizer):
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer_name({"pre_tokenizer": plain}) == "gpt-2"
    sequence = {"type": "Sequence", "pretokenizers": [digits, plain]}
    assert pre_tokenizer_name({"pre_tokenizer": sequence}) == "smollm"
    with pytest.raises(SliceGPTError, match=r"cuts texts into words .Whitespace. in a way"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}})
