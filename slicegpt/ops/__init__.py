"""The operators: one schema each, with CUDA, Triton and plain-PyTorch implementations behind it."""

from slicegpt.ops.gram import gram_

__all__ = ["gram_"]
