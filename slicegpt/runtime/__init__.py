"""The fast form of the network: weights packed for the fused operators, a static cache, generation without waiting."""

from slicegpt.runtime.canonical import to_canonical
from slicegpt.runtime.engine import Runtime
from slicegpt.runtime.packing import PackedNetwork, pack
from slicegpt.runtime.sampling import Sampling

__all__ = ["PackedNetwork", "Runtime", "Sampling", "pack", "to_canonical"]
