"""Serving sliced models on vLLM: the plugin that vLLM loads, and the hand-over of `slicegpt serve`.

Nothing here imports vLLM before it is needed; `slicegpt.serving.vllm_model` alone subclasses its classes.
"""

from .plugin import register

__all__ = ["register"]
