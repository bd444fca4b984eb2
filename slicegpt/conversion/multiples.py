"""The multiple that widths and numbers of neurons are rounded to, from the width of the model and the device.

What a kernel needs is less than what it likes. Rows of 16 bytes, 8 numbers in 16 bits, are the least that tensor cores
and vector loads take without a slower path. From there on a multiple only decides how much of the last tile is wasted:

- GPU: a row of weights that is a multiple of 64 numbers begins on a line of the cache (128 bytes), and no tile of 64
  along the inner dimension is cut. A model thousands wide has that for 1 or 2 % of its width. One that is 576 wide
  would have 9 steps in all: there the size that was asked for is worth more.
- the stock forms, whatever the device: other engines run it, and most of them quantise it. llama.cpp's 4 and 8 bits are
  in blocks of 32 numbers of a row, its k-quants in blocks of 256, and a matrix whose rows are no multiple of them takes
  more bits; the 4-bit kernels of GPUs cut tiles of 64 or 128.
- CPU: the kernels work through rows of weights in panels of a few vectors and read them once, so bytes decide, whatever
  the multiple.
"""

import torch

from slicegpt.errors import SliceGPTError
from slicegpt.recipe import AUTO, SLICED

LEAST = 8
WHOLE_LINES = 64
# From this width on 64 columns are at most 3 % of it.
WIDE = 2048
# Numbers of a block that llama.cpp quantises.
BLOCK, SUPER_BLOCK = 32, 256


def multiple_of(
    round_to: int | str, dense_width: int, device: torch.device | str = "cpu", form: str = SLICED
) -> int:
    """The multiple that `round_to` stands for.

    Args:
        round_to: a number, which is returned as it is, or "auto".
        dense_width: columns of the dense model's residual stream.
        device: that the model is sliced on, and taken to run on.
        form: of the sliced model, see `slicegpt.recipe.Recipe`.

    Raises:
        SliceGPTError: it is neither "auto" nor at least 1.
    """
    if round_to == AUTO and form != SLICED:
        return SUPER_BLOCK if dense_width >= WIDE else BLOCK
    if round_to == AUTO:
        return WHOLE_LINES if torch.device(device).type == "cuda" and dense_width >= WIDE else LEAST
    if isinstance(round_to, str) or round_to < 1:
        raise SliceGPTError(f"must be at least 1 or {AUTO}, got {round_to}", "round_to")
    return round_to
