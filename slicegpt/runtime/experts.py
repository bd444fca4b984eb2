"""Mixtures of experts on packed weights: the experts that a token is routed to, added to the stream.

The shared expert and the shortcut are the block's input and output GEMM, as an MLP's are. Of the others only those that
are chosen are read: on a CPU one after the other through the kernels of `norm_linear` and `rotate_add`, on a GPU all at
once through PyTorch's grouped GEMM, or a batched one over copies of their weights for few rows, which a CUDA graph can
capture. The router is that of the plain model, operator by operator: another rounding would choose another expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt.modeling.experts import Routing, SlicedMoE


@dataclass(frozen=True)
class PackedMixture:
    """The router and the experts of one layer.

    Attributes:
        module: shares the tensors of the layer's own module, and outlives it; the shared expert is not in it.
        activation: of `norm_linear`, for gate and up below each other; None where it has none of them.
        width, eps: of the norm.
        shared_neurons: of the shared expert, 0 where there is none.
    """

    module: SlicedMoE
    activation: str | None
    width: int
    eps: float
    shared_neurons: int

    @classmethod
    def of(
        cls, module: SlicedMoE, activation: str | None, width: int, eps: float, shared_neurons: int
    ) -> PackedMixture:
        """Takes the weights of `module` as they are."""
        own = copy.copy(module)
        own._modules = {name: _sharing(module._modules[name]) for name in ("gate", "experts")}
        gate = module.shared_expert_gate
        own._modules |= {
            "shared_expert": None,
            "shared_expert_gate": None if gate is None else _sharing(gate),
        }
        return cls(own, activation, width, eps, shared_neurons)

    def weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.module.parameters()]

    def idle_bytes(self, rows: int) -> int:
        """Bytes of the experts that `rows` tokens do not read at least, were no two of them to choose the same."""
        experts = [parameter for parameter in self.module.experts.parameters()]
        whole, count = sum(parameter.nbytes for parameter in experts), self.module.num_experts
        return whole * max(0, count - rows * self.module.gate.top_k) // count


def _sharing(module: torch.nn.Module) -> torch.nn.Module:
    own = copy.copy(module)
    own._parameters, own._buffers = dict(module._parameters), dict(module._buffers)
    return own


def add_experts(
    mixture: PackedMixture,
    stream: Tensor,
    base: Tensor,
    norm_linear: Callable[..., Tensor],
    rotate_add: Callable[..., tuple[Tensor, Tensor | None]],
) -> Tensor:
    """What the chosen experts write, added to `base`.

    Args:
        stream: [tokens, d], before the block; base: [tokens, d'], what the block writes besides.
        norm_linear, rotate_add: the operators, or the CPU's kernels.
    """
    normed = F.rms_norm(stream, (mixture.width,), None, mixture.eps)
    module, experts = mixture.module, mixture.module.experts
    routing = module.route(normed)
    if stream.is_cuda or mixture.activation is None:
        return base + experts(normed, routing)
    return _one_by_one(mixture, stream, base, routing, norm_linear, rotate_add)


def _one_by_one(
    mixture: PackedMixture,
    stream: Tensor,
    base: Tensor,
    routing: Routing,
    norm_linear: Callable[..., Tensor],
    rotate_add: Callable[..., tuple[Tensor, Tensor | None]],
) -> Tensor:
    experts, single = mixture.module.experts, len(stream) == 1
    for number, part in routing.groups():
        tokens, weights = routing.tokens[part], routing.weights[part, None].to(stream.dtype)
        rows, into = (stream, base) if single else (stream[tokens], base[tokens])
        weight = experts.gate_up_proj[number]
        bias = None if experts.gate_up_proj_bias is None else experts.gate_up_proj_bias[number]
        activations = norm_linear(
            rows, weight, bias, None, len(weight), mixture.activation, mixture.width, mixture.eps
        )
        if experts.down_proj_bias is not None:
            into = into + weights * experts.down_proj_bias[number]
        written, _ = rotate_add(activations * weights, experts.down_proj[number], into, None, None, None)
        base = written if single else base.index_copy(0, tokens, written)
    return base


def shared_factor(mixture: PackedMixture, stream: Tensor) -> Tensor | None:
    """What the shared expert's output is multiplied by, [tokens, 1]; None for 1."""
    if mixture.module.shared_expert_gate is None:
        return None
    return mixture.module.shared_weight(F.rms_norm(stream, (mixture.width,), None, mixture.eps))
