"""Mixtures of experts: a router that chooses some experts for every token, and their weights side by side.

Router and experts read one norm, so that a rotation of the stream folds into the columns of both. transformers'
interface for experts (`use_experts_implementation`) takes experts whose output is as wide as their input, which those
between two boundaries need not be; so the grouped products are called here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .configuration import SlicedConfig
from .layers import SlicedGatedMLP, SlicedMLP, build_activation, build_mlp


@dataclass(frozen=True)
class Routing:
    """Which tokens the experts read: S = tokens x `num_experts_per_tok` rows, in the order of the experts.

    Attributes:
        tokens: int64 [S], the token of a row; experts: int64 [S], ascending.
        weights: [S], what the row's output is multiplied by; float32, or float64.
        ends: int32 [experts], the row behind the last one of each expert.
        places: int64 [tokens, experts per token], the rows of a token.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor, experts: torch.Tensor, count: int) -> Routing:
        """From the router's choice [tokens, experts per token] among `count` experts; nothing is synchronised."""
        ascending, order = experts.flatten().sort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        ends = torch.searchsorted(ascending, torch.arange(count, device=order.device), right=True)
        tokens = order // experts.shape[1]
        return cls(tokens, ascending, weights.flatten()[order], ends.int(), places.view(experts.shape))

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """The weighted sum [tokens, columns] of what the experts give [S, columns], in one order."""
        weighted = rows * self.weights[:, None]
        return weighted[self.places].sum(dim=1).to(rows.dtype)

    def groups(self) -> list[tuple[int, slice]]:
        """Number and rows of every expert that has any; on a GPU this waits for the router."""
        return groups_of(self.ends)


def groups_of(ends: torch.Tensor) -> list[tuple[int, slice]]:
    """`Routing.groups`, of its `ends`."""
    ends = ends.tolist()
    rows = zip([0, *ends[:-1]], ends, strict=True)
    return [(expert, slice(begin, end)) for expert, (begin, end) in enumerate(rows) if end > begin]


def sparsemixer(scores: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers [tokens, 2] of the experts that Phi-3.5-MoE chooses from `scores` [tokens, experts].

    Each is the best of those left, and its weight a softmax over those whose scores come near enough: within
    `2 threshold` of it, relative to the larger absolute value (Liu et al. 2024, arXiv 2409.12136; the expectation that
    is taken outside of training).
    """
    left, weights, chosen = scores, [], []
    for _ in range(2):
        best, expert = left.max(dim=-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * threshold
        weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, expert))
        chosen.append(expert)
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(chosen, dim=-1)


class SlicedRouter(nn.Module):
    """The choice of `num_experts_per_tok` experts for every token, and their weights."""

    def __init__(self, config: SlicedConfig, in_width: int):
        super().__init__()
        self.top_k, self.scoring_func = config.num_experts_per_tok, config.scoring_func
        self.norm_topk_prob, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.groups, self.topk_group = config.n_group, config.topk_group
        self.threshold, self.in_float32 = config.router_jitter_noise, config.router_in_float32
        self.weight = nn.Parameter(torch.zeros(config.num_experts, in_width))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        correction = torch.zeros(config.num_experts) if config.score_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (float32, or float64) and numbers of the chosen experts, both [tokens, experts per token]."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if self.in_float32:
            bias = None if self.bias is None else self.bias.to(wide)
            logits = F.linear(hidden_states.to(wide), self.weight.to(wide), bias)
        else:
            logits = F.linear(hidden_states, self.weight, self.bias).to(wide)
        if self.scoring_func == "sparsemixer":
            return sparsemixer(logits, self.threshold)
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        experts = self._choose(scores)
        weights = scores.gather(1, experts)
        if self.norm_topk_prob:
            # Sigmoids may all vanish; a softmax's largest values cannot.
            least = 1e-20 if self.scoring_func == "sigmoid" else 0.0
            weights = weights / (weights.sum(dim=-1, keepdim=True) + least)
        return weights * self.scale, experts

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.topk_group < self.groups:
            parts = scores.unflatten(-1, (self.groups, -1))
            count = 2 if self.scoring_func == "sigmoid" else 1
            best = parts.topk(min(count, parts.shape[-1]), dim=-1).values.sum(dim=-1)
            out = torch.ones_like(best, dtype=torch.bool)
            out.scatter_(1, best.topk(self.topk_group, dim=-1).indices, False)
            scores = parts.masked_fill(out[..., None], -torch.inf).flatten(1)
        return scores.topk(self.top_k, dim=-1).indices


class SlicedExperts(nn.Module):
    """The experts of a layer, from a boundary of `in_width` columns to one of `out_width`.

    Each is `down(act(gate(x)) * up(x))`; `gate_up_proj` [experts, 2 neurons, in_width] holds the rows of gate and of up
    one below the other, `down_proj` is [experts, out_width, neurons].

    Attributes:
        linear: `grouped_linear`, or what an engine has in its place.
    """

    def __init__(self, config: SlicedConfig, in_width: int, out_width: int, neurons: int):
        super().__init__()
        count = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.zeros(count, 2 * neurons, in_width))
        self.down_proj = nn.Parameter(torch.zeros(count, out_width, neurons))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(count, 2 * neurons)) if config.expert_bias else None
        self.down_proj_bias = (
            nn.Parameter(torch.zeros(count, out_width)) if config.expert_output_bias else None
        )
        self.act_fn = build_activation(config)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.linear = grouped_linear

    def forward(self, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[tokens, in_width] to [tokens, out_width]."""
        activations = self.activations(hidden_states, routing)
        return routing.combine(self.linear(activations, self.down_proj, self.down_proj_bias, routing))

    def activations(self, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        """What the experts' output layers read, [S, neurons], in the order of the routing."""
        rows = hidden_states[routing.tokens]
        return self.apply_gate(self.linear(rows, self.gate_up_proj, self.gate_up_proj_bias, routing))

    def apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 neurons] to [..., neurons]."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is None:
            return self.act_fn(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """Every row [S, in] through the layer of its expert: weight [experts, out, in], bias [experts, out] or None."""
    if (
        (rows.is_cuda or torch.compiler.is_compiling())
        and len(rows) <= len(weight)
        and not has_grouped_gemm(rows, weight)
    ):
        # Static shapes, as a captured graph needs; it copies the weights of the experts that are read.
        out = torch.bmm(weight[routing.experts], rows[:, :, None]).squeeze(2)
    else:
        out = expert_products(rows, weight, routing.ends)
    return out if bias is None else out + bias[routing.experts]


def expert_products(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_linear` without biases; where there is no grouped GEMM this waits for the router."""
    if has_grouped_gemm(rows, weight):
        return F.grouped_mm(rows, weight.mT, offs=ends)
    pieces = [F.linear(rows[part], weight[expert]) for expert, part in groups_of(ends)]
    return torch.cat(pieces) if pieces else rows.new_empty(0, weight.shape[1])


def has_grouped_gemm(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's grouped GEMM takes these: bfloat16 on a GPU from sm_80 on, rows on 16-byte boundaries."""
    return (
        rows.is_cuda
        and rows.dtype == weight.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and not any(size % 8 for size in weight.shape[1:])
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )


class SlicedMoE(nn.Module):
    """A mixture of experts in place of an MLP, from a boundary of `in_width` columns to one of `out_width`.

    Args:
        neurons: of an expert. The shared expert keeps its own number.
    """

    def __init__(self, config: SlicedConfig, layer_idx: int, in_width: int, out_width: int, neurons: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = SlicedRouter(config, in_width)
        self.experts = SlicedExperts(config, in_width, out_width, neurons)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = (
            SlicedGatedMLP(config, layer_idx, in_width, out_width, shared) if shared else None
        )
        self.shared_expert_gate = (
            nn.Linear(in_width, 1, bias=False) if shared and config.shared_expert_gate else None
        )

    def route(self, rows: torch.Tensor) -> Routing:
        """The experts of the tokens `rows` [tokens, in_width]."""
        return Routing.of(*self.gate(rows), self.num_experts)

    def shared_weight(self, rows: torch.Tensor) -> torch.Tensor | None:
        """What the shared expert's output is multiplied by, [tokens, 1]; None for 1."""
        return None if self.shared_expert_gate is None else self.shared_expert_gate(rows).sigmoid()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)
        written = self.experts(rows, self.route(rows))
        if self.shared_expert is not None:
            shared, weight = self.shared_expert(rows), self.shared_weight(rows)
            written = written + (shared if weight is None else shared * weight)
        return written.unflatten(0, hidden_states.shape[:-1])


def build_feed_forward(
    config: SlicedConfig, layer: int, in_width: int, out_width: int, neurons: int
) -> SlicedMLP | SlicedMoE:
    """The feed-forward part of a layer: an MLP, or a mixture of experts of so many neurons."""
    if config.is_sparse(layer):
        return SlicedMoE(config, layer, in_width, out_width, neurons)
    return build_mlp(config, layer, in_width, out_width, neurons)
