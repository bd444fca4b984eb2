"""What a launcher such as torchrun tells a process of itself, in its environment; torch is not imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

from slicegpt.errors import SliceGPTError


@dataclass(frozen=True)
class Launch:
    """One process of several that a launcher started together; as it stands, the only one.

    Attributes:
        rank: 0 to `size - 1`; the first one writes and prints.
        size: processes, on all nodes.
        local_rank: 0 to one less than the processes of this node; it chooses the device.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """How this process was started, by torchrun's variables `WORLD_SIZE`, `RANK` and `LOCAL_RANK`.

    Raises:
        SliceGPTError: a variable that is missing or no whole number where there are several processes.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return Launch()
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise SliceGPTError(
                f"{name}: must be a whole number where WORLD_SIZE={os.environ['WORLD_SIZE']} processes were started "
                f"together, got {text!r}; torchrun sets it"
            )
        numbers[name] = int(text)
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise SliceGPTError(f"RANK: must be below WORLD_SIZE={numbers['WORLD_SIZE']}, got {numbers['RANK']}")
    return Launch(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])
