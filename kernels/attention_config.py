"""How `decode_attention_` is launched: pure functions of device, dtype and sizes."""

import torch

# What a split has at least: below, a program's launch costs more than its reading.
SPLIT_TOKENS = 256
MAX_SPLITS = 64


def uses_tensor_cores(group: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a program has a key head with all of its `group` query heads, and not one query head alone."""
    return group >= 4 and dtype != torch.float32 and capability >= (8, 0)


def splits_for(capacity: int, programs: int, multiprocessors: int) -> int:
    """Into how many pieces, a power of two, a cache is cut: for two programs a processor, `programs` without it."""
    wanted = min(MAX_SPLITS, capacity // SPLIT_TOKENS, -(-2 * multiprocessors // programs))
    return 1 << max(0, wanted.bit_length() - 1)


def block_tokens(width: int, itemsize: int, dot: bool, warps: int = 4) -> int:
    """Tokens that a program of so many warps reads at a time: as many as its registers hold beside the sums."""
    return (8192 if dot else 8192 // itemsize) // max(128, width) * warps // 4


def warps_for(programs: int, multiprocessors: int, dot: bool) -> int:
    """Warps of a program: 16 where it has a multiprocessor for itself, which then has as many bytes on their way."""
    return 16 if not dot and programs <= multiprocessors else 4
