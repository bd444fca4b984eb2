"""Mixtures of experts in vLLM's graphs: their products as one operator, which tracing does not look into.

vLLM traces the network once, for any number of tokens. How many rows an expert has is only known when it runs.
"""

import torch
from torch import nn

from slicegpt.modeling.experts import Routing, SlicedExperts, expert_products, has_grouped_gemm
from slicegpt.ops.registration import register


def _expert_products_fake(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


_products = register(
    "expert_products(Tensor rows, Tensor weight, Tensor ends) -> Tensor",
    expert_products,
    _expert_products_fake,
)


def expert_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """`slicegpt.modeling.experts.grouped_linear` as an operator."""
    out = _products(rows, weight, routing.ends)
    return out if bias is None else out + bias[routing.experts]


def use_operator(model: nn.Module, captured: bool) -> None:
    """Let all experts of `model` take the operator.

    Args:
        captured: the model runs in CUDA graphs, which cannot wait for the router: it needs the grouped GEMM.

    Raises:
        ValueError: there is none for these weights.
    """
    for module in model.modules():
        if not isinstance(module, SlicedExperts):
            continue
        module.linear = expert_linear
        for weight in (module.gate_up_proj, module.down_proj):
            if captured and weight.is_cuda and not has_grouped_gemm(weight[0, :1], weight):
                raise ValueError(
                    "experts in CUDA graphs need dtype bfloat16, sm_80 or later and widths that are multiples of 8, "
                    f"got {weight.dtype} and a weight of {tuple(weight.shape)}: serve with --enforce-eager"
                )
