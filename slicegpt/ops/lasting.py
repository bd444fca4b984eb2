"""Device memory that is kept for all later calls: constants, and counters that launches leave as they found them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def made_to_last(make: Callable[[], Made], device: torch.device) -> Made:
    """What `make` returns, whole before any stream can use it, and in no graph's memory.

    Every stream of the device, and every graph, may use such memory from now on, so that none can be asked to wait: the
    call returns when the device has written it. `torch.compile(mode="reduce-overhead")` sends all allocations of its
    thread to a graph's pool, from its warm-up on: another thread makes these.
    """

    def run() -> Made:
        made = make()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()
