"""Registers an operator with PyTorch: its schema, an implementation for CPU and CUDA tensors, and a fake for tracing.

`Library.define/impl` costs about 4 µs a call where `torch.library.custom_op` costs 18.
"""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("slicegpt", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define `slicegpt::<schema>`, register both functions, and return the callable operator."""
    name = LIBRARY.define(schema).split("::")[-1]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"slicegpt::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.slicegpt, name).default
