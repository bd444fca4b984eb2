"""Fast inference: weights packed for the fused operators, a preallocated cache, generation without host syncs."""

from slicegpt.conversion.canonical import to_canonical
from slicegpt.runtime.engine import Runtime
from slicegpt.runtime.fused_layers import fuse_layers, unfuse_layers
from slicegpt.runtime.packed import PackedNetwork
from slicegpt.runtime.packing import pack
from slicegpt.runtime.sampling import Sampling

__all__ = ["PackedNetwork", "Runtime", "Sampling", "fuse_layers", "pack", "to_canonical", "unfuse_layers"]
