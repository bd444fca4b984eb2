"""llama.cpp's own quantiser, where `llama-cpp-python` is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from slicegpt.errors import SliceGPTError

# The names that people know; llama.cpp's constants are these in capitals.
QUANTIZED = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)


def check_quantizer(kind: str) -> None:
    """Raises:
    SliceGPTError: llama.cpp's quantiser is not here.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise SliceGPTError(
            f"{kind} is quantised by llama.cpp itself, which is not here: pip install llama-cpp-python, or write f16 "
            "and quantise that with llama-quantize",
            "type",
        )


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantise a GGUF file of plain numbers into another one.

    Matrices whose rows are no multiple of a type's block get the next larger type that fits, as llama.cpp decides.

    Args:
        kind: one of `QUANTIZED`.

    Raises:
        SliceGPTError: llama.cpp refuses.
    """
    import ctypes

    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    with _silenced():
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
    if code or not target.is_file():
        raise SliceGPTError(f"llama.cpp cannot quantise to {kind} (code {code})", "type")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """llama.cpp prints a line for every tensor; afterwards it logs as its Python package lets it."""
    import ctypes

    import llama_cpp
    from llama_cpp import _logger

    @llama_cpp.llama_log_callback
    def silent(level, text, data):
        pass

    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    try:
        yield
    finally:  # before `silent` is gone: llama.cpp calls whatever it was given
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
