"""The tokenizer in a GGUF file: copied from another GGUF file, or converted from a Hugging Face one.

What llama.cpp calls a pre-tokenizer is a name that its code knows, and the way of cutting a text into words that goes
with it; the names here are those of the ways that `tokenizer.json` spells out in the same words. Meaning of the keys:
the GGUF specification (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from slicegpt.errors import SliceGPTError

# The kinds of tokens that llama.cpp tells apart.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression by which a text is split, and llama.cpp's name of it.
SPLITS = {
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
}


def copy_tokenizer(writer, file: Path) -> None:
    """Copy all that a GGUF file says of its tokenizer."""
    import gguf

    arrays = gguf.GGUFValueType.ARRAY
    for name, field in gguf.GGUFReader(file).fields.items():
        if not name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == arrays else None)


def convert_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Write a byte-level BPE tokenizer.

    Args:
        vocabulary: rows of the embedding table; those that no token has become unused ones.

    Raises:
        SliceGPTError: another kind of tokenizer, or one that cuts texts in a way that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SliceGPTError(f"{type(tokenizer).__name__} has no tokenizer.json; {_ADVICE}", "tokenizer")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "byte-fallback BPE (SentencePiece)" if model["type"] == "BPE" else model["type"]
        raise SliceGPTError(f"must be a byte-level BPE, got {kind}; {_ADVICE}", "tokenizer")
    # llama.cpp composes no characters, and its own converter leaves that out as well.
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise SliceGPTError(f"must not normalise texts, got {normalizer}; {_ADVICE}", "tokenizer")
    names = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    for added in content["added_tokens"]:
        names[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(names) >= vocabulary:
        raise SliceGPTError(f"has token {max(names)}, the model's table {vocabulary} rows", "tokenizer")
    rows = range(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(content))
    writer.add_token_list([names.get(row, f"[PAD{row}]") for row in rows])
    writer.add_token_types([kinds.get(row, UNUSED) for row in rows])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            add(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


_ADVICE = "name a GGUF file of the dense model, whose tokenizer is copied (--tokenizer FILE)"


def pre_tokenizer_name(content: dict) -> str:
    """llama.cpp's name of the way in which a `tokenizer.json` cuts a text into words.

    Raises:
        SliceGPTError: it has none that is known here.
    """
    found = content.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    *first, last = parts
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and len(first) <= 1:
        before, words = first[0] if first else {}, last.get("use_regex", True)
        if words and not first:
            return "gpt-2"
        if words and before.get("type") == "Digits" and before.get("individual_digits"):
            return "smollm"
        name = SPLITS.get((before.get("pattern") or {}).get("Regex"))
        isolated = before.get("behavior") == "Isolated" and not before.get("invert")
        if not words and before.get("type") == "Split" and isolated and name is not None:
            return name
    kinds = " and ".join(part.get("type", "none") for part in parts)
    raise SliceGPTError(
        f"cuts texts into words ({kinds}) in a way that llama.cpp has no name for here; {_ADVICE}",
        "tokenizer",
    )
