"""Commands that several processes share, `torchrun --nproc-per-node N -m slicegpt ...`: one of them prints.

`slice`, `eval` and `bench slicing` do, and `finetune` in its own way; the others refuse.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slicegpt.cli.log_file import log
from slicegpt.errors import SliceGPTError
from slicegpt.hardware.launcher import launched

if TYPE_CHECKING:
    import torch

    from slicegpt.hardware.ranks import Ranks
    from slicegpt.progress import Progress

# Set where this process has been chosen to say why a job has failed.
_chosen = False


def is_silent() -> bool:
    """Whether another process prints in the place of this one.

    What is wrong with the arguments all processes of a node find out alike, and its first one says it. Later on, it is
    the first of the job to fail.
    """
    try:
        return launched().local_rank > 0 and not _chosen
    except SliceGPTError:
        return False


def check(options: argparse.Namespace) -> None:
    """Begin a command; refuse one that several processes cannot share."""
    global _chosen
    _chosen = False  # a command before this one, in the same process, may have ended with an error
    size = launched().size
    if size > 1 and not getattr(options, "shared", False):
        raise SliceGPTError(
            f"one process does it, and {size} were started together: start it without torchrun (WORLD_SIZE={size})"
        )


@contextmanager
def shared(
    options: argparse.Namespace, kept: Callable[[], str | None] = lambda: None
) -> Iterator[tuple[Ranks, torch.device, Progress]]:
    """The processes that share a command, this one's device for `--device`, and where it reports.

    Args:
        kept: what a job that a dead rank ends has kept, in one clause.
    """
    global _chosen
    from slicegpt.hardware.ranks import RankLost, joined
    from slicegpt.progress import Progress

    def with_what_is_kept(reason: str) -> str:
        return "; ".join(filter(None, (reason, kept())))

    def say(reason: str) -> None:
        line = f"slicegpt {options.command}: error: {with_what_is_kept(reason)}"
        os.write(2, f"{line}\n".encode())  # whatever the main thread does with the stream at this moment
        log(line)

    first = launched().rank == 0
    if not first:
        _silence()
    try:
        with joined(options.device, say) as (ranks, device):
            yield ranks, device, Progress(quiet=not first)
    except RankLost as error:
        _chosen = True
        raise SliceGPTError(with_what_is_kept(error.reason)) from error
    except (KeyboardInterrupt, Exception):
        _chosen = True
        raise


def _silence() -> None:
    """Libraries warn and draw bars in every process; the first one's are enough."""
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
