"""The operators: one schema each, with CUDA, Triton and plain-PyTorch implementations behind it."""

from slicegpt.ops.cross_gram import cross_gram_
from slicegpt.ops.decode_attention import decode_attention_
from slicegpt.ops.gram import gram_
from slicegpt.ops.norm_linear import norm_linear
from slicegpt.ops.rotate_add import rotate_add

__all__ = ["cross_gram_", "decode_attention_", "gram_", "norm_linear", "rotate_add"]
