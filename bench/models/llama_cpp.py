"""llama.cpp as an engine, where the package `llama_cpp` (llama-cpp-python) is installed: a GGUF file, one sequence.

What is timed is the C call, `llama_decode`, and the choice of the likeliest token from its logits where they lie: not
the Python class around it, which copies them.
"""

import ctypes
import os
import weakref
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from slicegpt.bench.models.decoders import GreedyDecoder
from slicegpt.errors import SliceGPTError

# Tokens of a prompt that are computed at a time: what the runtime takes.
PROMPT_TOKENS = 512


def is_available() -> bool:
    """Whether the package is installed."""
    return find_spec("llama_cpp") is not None


class GGUFFacts:
    """What a GGUF file says of itself, without its weights.

    Attributes:
        kind: of most of its weights, as llama.cpp calls it: "q8_0", "q4_0", "bf16".
        shape: layers, columns of the stream, vocabulary.
        stored_bytes, read_bytes: of all tensors; of those that every token reads (all but a table of embeddings that
            is not the head as well).
    """

    def __init__(self, path: str):
        try:
            import gguf
        except ImportError as error:
            raise SliceGPTError("needs the package gguf: pip install slicegpt[gguf]", "gguf") from error
        if not Path(path).is_file():
            raise SliceGPTError(f"must be a GGUF file, got {path!r}", "gguf")
        try:
            reader = gguf.GGUFReader(path)
        except ValueError as error:
            raise SliceGPTError(f"{path!r} is no GGUF file: {error}", "gguf") from error
        architecture = reader.fields["general.architecture"].contents()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        table = tensors["token_embd.weight"]
        of_kinds: dict[str, int] = {}
        for tensor in reader.tensors:
            if tensor.name.startswith("blk."):
                name = tensor.tensor_type.name.lower()
                of_kinds[name] = of_kinds.get(name, 0) + int(tensor.n_elements)
        self.kind = max(of_kinds, key=of_kinds.__getitem__)
        self.shape = (
            int(reader.fields[f"{architecture}.block_count"].contents()),
            int(reader.fields[f"{architecture}.embedding_length"].contents()),
            int(table.shape[1]),
        )
        self.stored_bytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        tied = "output.weight" not in tensors
        self.read_bytes = self.stored_bytes - (0 if tied else int(table.n_bytes))


@lru_cache
def library():
    """The module of C functions, silent."""
    from llama_cpp import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(level, text, data):
        return None

    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    library.silent = silent  # it is called as long as the process lives
    llama_cpp.llama_backend_init()
    return llama_cpp


class LlamaCppDecoder(GreedyDecoder):
    """Greedy decoding of one sequence by llama.cpp, on as many threads as torch has.

    Args:
        path: the GGUF file.
        facts: of that file.
        length: tokens of prompt and answer together.
    """

    def __init__(self, path: str, facts: GGUFFacts, length: int):
        self.weight_bytes, self.stored_bytes = facts.read_bytes, facts.stored_bytes
        self.c = c = library()
        self.vocabulary = facts.shape[2]
        self.model = _model(path)
        parameters = c.llama_context_default_params()
        parameters.n_ctx = -(-length // 256) * 256
        parameters.n_batch = parameters.n_ubatch = PROMPT_TOKENS
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        self.context = c.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        weakref.finalize(self, c.llama_free, self.context)
        self.token = (c.llama_token * 1)(5)

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([[self.token[0]]])

    def prompt(self, ids: Tensor) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        for piece in ids[0].split(PROMPT_TOKENS):
            self._decode((self.c.llama_token * len(piece))(*piece.tolist()), len(piece))
        self._choose()

    def fill(self, context: int) -> None:
        raise NotImplementedError("llama.cpp's cache cannot be filled from outside")

    def step(self) -> None:
        self._decode(self.token, 1)
        self._choose()

    def _decode(self, tokens, count: int) -> None:
        code = self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, count))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _choose(self) -> None:
        logits = self.c.llama_get_logits_ith(self.context, -1)
        buffer = (ctypes.c_float * self.vocabulary).from_address(ctypes.addressof(logits.contents))
        self.token[0] = int(torch.frombuffer(buffer, dtype=torch.float32).argmax())


@lru_cache
def _model(path: str):
    c = library()
    parameters = c.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = c.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    return model


def starter(path: str, facts: GGUFFacts) -> Callable:
    """An engine's `start`: (network, batch, length) -> decoder."""

    def start(network, batch: int, length: int) -> LlamaCppDecoder:
        if batch > 1:
            raise NotImplementedError("one sequence only")
        return LlamaCppDecoder(path, facts, length)

    return start
