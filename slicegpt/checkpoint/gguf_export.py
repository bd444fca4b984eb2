"""A model without shortcuts as a GGUF file, which llama.cpp runs: settings, tokenizer and tensors.

Which models have a graph there, and which one: `slicegpt.checkpoint.gguf_network`.

Keys and tensor names are those of the `gguf` package; their meaning: the GGUF specification (ggml-org/ggml,
docs/gguf.md). Values that change no result of llama.cpp are left out.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from slicegpt.checkpoint.dense_source import open_dense
from slicegpt.checkpoint.gguf_network import Network, network_of
from slicegpt.checkpoint.gguf_quantize import QUANTIZED, check_quantizer, quantize
from slicegpt.checkpoint.gguf_tokenizer import convert_tokenizer, copy_tokenizer
from slicegpt.checkpoint.names import SHIPPED_MODEL
from slicegpt.checkpoint.saving import read_record
from slicegpt.conversion.quantization import check_plain
from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource
from slicegpt.families.rewriting import halves_to_neighbours
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.layers import SlicedRotaryEmbedding

PLAIN = ("f32", "f16", "bf16")
TYPES = (*PLAIN, *QUANTIZED)


def export_gguf(
    model: str | os.PathLike,
    file: str | os.PathLike,
    kind: str = "f16",
    tokenizer: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        model: a folder in the stock form, or a sliced one without shortcuts, or a dense model of a family whose
            canonical network llama.cpp has.
        file: to write; it appears only when it is whole.
        kind: of the weights, one of `TYPES`. Those that are quantised are so by llama.cpp's own quantiser, from float32
            or from the 16 bits that the folder has. Norms and biases are float32.
        tokenizer: a GGUF file whose tokenizer is copied. None: the one that the model was sliced from, where that was a
            GGUF file and is there, else the folder's own, converted.
        overwrite: an existing file is replaced once the new one is whole.

    Returns:
        The file's absolute path.

    Raises:
        SliceGPTError: one line naming the argument, or the part of the model that llama.cpp has no place for.
    """
    path = _checked_file(file, overwrite)
    if kind not in TYPES:
        raise SliceGPTError(f"must be one of {', '.join(TYPES)}, got {kind!r}", "type")
    if importlib.util.find_spec("gguf") is None:
        raise SliceGPTError("needs the package gguf: pip install 'slicegpt[gguf]'", "gguf")
    if kind in QUANTIZED:
        check_quantizer(kind)
    source = open_dense(os.fspath(model), sliceable=False)
    check_plain(source.config, os.fspath(model))
    network = network_of(source)
    vocabulary = _tokenizer_file(os.fspath(model), tokenizer)
    written = kind
    if kind in QUANTIZED:
        written = "f32" if source.dtype in (torch.float32, torch.float64) else "bf16"
        written = "f16" if source.dtype == torch.float16 else written
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder) / "model.gguf"
        write_network(network, whole, written, source.tokenizer, vocabulary)
        if kind in QUANTIZED:
            plain, whole = whole, Path(folder) / "quantized.gguf"
            quantize(plain, whole, kind)
        os.replace(whole, path)
    return path


def _checked_file(file: str | os.PathLike, overwrite: bool) -> Path:
    path = Path(file).absolute()
    if path.is_dir():
        raise SliceGPTError(f"{file} is a folder, expected a file", "gguf")
    if path.exists() and not overwrite:
        raise SliceGPTError(f"{file} exists already; choose another file, or overwrite it", "gguf")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SliceGPTError(f"cannot write in {path.parent}", "gguf")
    return path


def _tokenizer_file(model: str, given: str | os.PathLike | None) -> Path | None:
    """The GGUF file that the tokenizer is copied from; None for the folder's own."""
    if given is not None:
        path = Path(given)
        if not path.is_file() or path.open("rb").read(4) != b"GGUF":
            raise SliceGPTError(f"must be a GGUF file, got {os.fspath(given)!r}", "tokenizer")
        return path
    record = read_record(model) if Path(model).is_dir() else None
    source = model if record is None else record.get("source", "")
    if source.lower() == SHIPPED_MODEL:
        from slicegpt.checkpoint.gguf import shipped_checkpoint

        return shipped_checkpoint()
    path = Path(source)
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


# --- the file -----------------------------------------------------------------------------------------------------


def write_network(network: Network, file: Path, kind: str, tokenizer, vocabulary: Path | None) -> None:
    """Write settings, tokenizer and tensors, these one at a time.

    Args:
        kind: of the matrices, one of `PLAIN`.
        tokenizer: the Hugging Face one; converted where `vocabulary`, a GGUF file to copy it from, is None.
    """
    import gguf

    writer = gguf.GGUFWriter(file, network.architecture)
    try:
        write_settings(writer, network, kind)
        if vocabulary is not None:
            copy_tokenizer(writer, vocabulary)
        elif tokenizer is None:
            raise SliceGPTError("the model has none; name a GGUF file to copy it from", "tokenizer")
        else:
            convert_tokenizer(writer, tokenizer, network.config.vocab_size)
        # Names and shapes are written before the first tensor: the shapes of all layers, none of which is kept.
        for name, tensor in tensors_of(network, shapes_only=True):
            _add_entry(writer, name, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors_of(network):
            writer.write_tensor_data(_stored(tensor, kind))
    finally:
        writer.close()


def write_settings(writer, network: Network, kind: str) -> None:
    """The architecture's key-value pairs."""
    import gguf

    config, neurons = network.config, network.config.neurons
    layers = config.num_hidden_layers
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        }[kind]
    )
    writer.add_name(Path(network.source.name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(network.width)
    writer.add_block_count(layers)
    uneven = network.architecture == "deci"
    writer.add_feed_forward_length(list(neurons) if uneven else neurons[0])
    heads, keys = config.attention_heads, config.key_value_heads
    writer.add_head_count(heads if uneven else heads[0])
    writer.add_head_count_kv(keys if uneven else keys[0])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(network.eps)
    writer.add_vocab_size(config.vocab_size)


def tensors_of(network: Network, shapes_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file in order; with `shapes_only` on the meta device, where nothing is read."""
    if shapes_only:
        network = Network(network.config, network.eps, network.architecture, _on_meta(network.source))
    config, device = network.config, "meta" if shapes_only else "cpu"
    ones = torch.ones(network.width, device=device)
    # llama.cpp turns neighbours in these graphs, and halves in the others.
    neighbours = network.architecture in ("llama", "deci")
    yield "token_embd.weight", network.embedding()
    factors = rotary_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors.to(device)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"} | {
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    for index, layer in enumerate(network.layers()):
        root = f"blk.{index}"
        yield f"{root}.attn_norm.weight", ones if layer.attention_norm is None else layer.attention_norm
        yield f"{root}.ffn_norm.weight", ones if layer.mlp_norm is None else layer.mlp_norm
        for part, name in names.items():
            linear = layer.linears[part]
            if neighbours and part in ("q", "k"):
                linear = halves_to_neighbours(linear, config.head_dim)
            yield f"{root}.{name}.weight", linear.weight
            if linear.bias is not None:
                yield f"{root}.{name}.bias", linear.bias
            elif part == "o" and neighbours and layer.linears["q"].bias is not None:
                # Readers of the format take biases of attention to be on all four, or on none.
                yield f"{root}.{name}.bias", torch.zeros(network.width, device=device)
        if layer.q_norm is not None:
            yield f"{root}.attn_q_norm.weight", layer.q_norm
            yield f"{root}.attn_k_norm.weight", layer.k_norm
    norm = network.final_norm()
    yield "output_norm.weight", ones if norm is None else norm
    if (head := network.head()) is not None:
        yield "output.weight", head


def _on_meta(source: DenseSource) -> DenseSource:
    """The source with tensors that have a shape and nothing else."""
    return replace(
        source, tensors={name: each.to("meta") for name, each in source.shell.state_dict().items()}
    )


def rotary_factors(config: SlicedConfig) -> torch.Tensor | None:
    """What llama.cpp divides every rotary frequency by [head_dim / 2] float32; None where all are 1."""
    if config.rope_parameters["rope_type"] == "default":
        return None
    plain, _ = SlicedRotaryEmbedding.compute_default_rope_parameters(config)
    return plain / SlicedRotaryEmbedding(config).inv_freq


def _add_entry(writer, name: str, tensor: torch.Tensor, kind: str) -> None:
    """Name, shape and type of a tensor."""
    import gguf

    matrix = tensor.dim() == 2
    bfloat = matrix and kind == "bf16"
    dtype = np.dtype(np.float16 if matrix and kind == "f16" else np.float32)
    size = tensor.numel() * (2 if bfloat else dtype.itemsize)
    raw = gguf.GGMLQuantizationType.BF16 if bfloat else None
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if bfloat else tuple(tensor.shape)
    writer.add_tensor_info(name, shape, np.dtype(np.uint8) if bfloat else dtype, size, raw)


def _stored(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor as its bytes stand in the file.

    Raises:
        SliceGPTError: a number that float16 cannot hold.
    """
    if tensor.dim() != 2 or kind == "f32":
        return tensor.float().contiguous().numpy()
    if kind == "bf16":
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    half = tensor.half()
    if not bool(half.isfinite().all()):
        raise SliceGPTError("f16 cannot hold the largest weight; take bf16 or f32", "type")
    return half.contiguous().numpy()
