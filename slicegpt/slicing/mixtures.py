"""Mixtures of experts as slicing runs them: input weights final, output at full width, expert by expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from slicegpt.conversion.folding import fold_writer, named, rotate_writer, stacked_writers
from slicegpt.families import Linear, Mixture
from slicegpt.modeling import SlicedConfig, WeightlessRMSNorm
from slicegpt.modeling.experts import Routing, SlicedMoE, grouped_linear

# Names of a mixture's output layers among the writers of a block: "experts.0", "experts.1", ..., and this one.
SHARED = "shared_expert"


def expert_name(number: int) -> str:
    """The name of an expert among the writers of a block."""
    return f"experts.{number}"


def mixture_writers(mixture: Mixture, centred: bool, device: torch.device) -> dict[str, Linear]:
    """Of every expert its output layer [D, K] with the mean subtraction folded in; the shared one's comes last."""
    writers = {
        expert_name(number): fold_writer(mixture.expert(number).down, centred, device)
        for number in range(mixture.count)
    }
    if mixture.shared is not None:
        writers[SHARED] = fold_writer(mixture.shared.down, centred, device)
    return writers


def mixture_writer_state(
    writers: Mapping[str, Linear],
    neurons: Mapping[str, torch.Tensor] | None,
    basis: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """State of a mixture's output layers, brought onto the basis after the block.

    Args:
        neurons: of each expert, those that stay; None: all.
    """
    experts = []
    for name, writer in writers.items():
        rotated = rotate_writer(writer, basis)
        if name == SHARED:
            return stacked_writers(experts, dtype) | named(f"{SHARED}.down_proj", rotated, dtype)
        if neurons is not None:
            rotated = Linear(rotated.weight[:, neurons[name]], rotated.bias)
        experts.append(Linear(rotated.weight.to(dtype), rotated.bias))
    return stacked_writers(experts, dtype)


def kept_readers(
    state: Mapping[str, torch.Tensor], neurons: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state of a mixture's input layers with the `neurons` of every expert alone."""
    kept = torch.stack([*neurons.values()])
    state = dict(state)
    for name in ("experts.gate_up_proj", "experts.gate_up_proj_bias"):
        if name in state:
            whole = state[name]
            rows = torch.cat((kept, kept + whole.shape[1] // 2), dim=1).to(whole.device)
            state[name] = torch.stack([one[own] for one, own in zip(whole, rows, strict=True)])
    return state


@dataclass(frozen=True)
class RoutedActivations:
    """What the output layers of a mixture read, of the tokens of one batch.

    Attributes:
        routing: of its rows.
        experts: [S, neurons], in the order of the routing.
        shared: [tokens, neurons] of the shared expert, or None; shared_weight: its factor [tokens], or None.
        shape: of the batch, [batch, tokens].
    """

    routing: Routing
    experts: torch.Tensor
    shared: torch.Tensor | None
    shared_weight: torch.Tensor | None
    shape: torch.Size

    def to(self, dtype: torch.dtype) -> RoutedActivations:
        """With the activations in `dtype`."""
        shared = None if self.shared is None else self.shared.to(dtype)
        return replace(self, experts=self.experts.to(dtype), shared=shared)


class LiftedMixture(nn.Module):
    """As `slicegpt.slicing.blocks.LiftedBlock`, of a block that is a mixture of experts.

    Its activations are one row for every token and expert that writes for it. What a dense shortcut carries is not
    fitted: it is given, as a compact one's is.

    Args:
        basis: V [D, d] float64; None for the identity.
        state: of the mixture, all but its output layers.
        writers: of every expert, and of the shared one, the output layer at full width.
        dtype: of the weights and of what passes between them. A stream of a wider one stays in it.
    """

    writes_shortcut = False

    def __init__(
        self,
        config: SlicedConfig,
        layer: int,
        basis: torch.Tensor | None,
        state: Mapping[str, torch.Tensor],
        writers: Mapping[str, Linear],
        dtype: torch.dtype,
    ):
        super().__init__()
        dense_width = config.dense_hidden_size
        width = dense_width if basis is None else basis.shape[1]
        with torch.device("meta"):
            mixture = SlicedMoE(config, layer, width, dense_width, config.dense_neurons[layer])
        for module in (mixture.experts, mixture.shared_expert):
            if module is not None:
                module.down_proj = None
        mixture.experts.down_proj_bias = None
        self.parts = nn.ModuleDict({"mlp": mixture})
        self.norm = WeightlessRMSNorm(width, config.rms_norm_eps * dense_width / width)
        self.basis = None if basis is None else basis.to(dtype)
        self.dtype = dtype
        neurons = config.dense_neurons[layer]
        # Columns of activations that a token has.
        self.groups = [config.num_experts_per_tok * neurons]
        if mixture.shared_expert is not None:
            self.groups.append(config.shared_expert_intermediate_size)
        # Of the layers that read the stream, for a token.
        self.rows = config.num_experts + 2 * sum(self.groups)
        self.sizes = {name: writer.weight.shape[1] for name, writer in writers.items()}
        self.set_readers({"mlp": state})
        self.set_writers(writers)
        self.eval()

    @property
    def mixture(self) -> SlicedMoE:
        return self.parts["mlp"]

    def set_readers(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take these tensors themselves."""
        self.mixture.load_state_dict(dict(states["mlp"]), assign=True)

    def set_writers(self, writers: Mapping[str, Linear]) -> None:
        """Take the output weights [D, K] of every expert, and their biases."""
        device = next(self.parts.parameters()).device
        experts = [writer for name, writer in writers.items() if name != SHARED]
        self.weight = torch.stack([writer.weight.to(device, self.dtype) for writer in experts])
        self.bias = None
        if experts[0].bias is not None:
            self.bias = torch.stack([writer.bias.to(device, self.dtype) for writer in experts])
        shared = writers.get(SHARED)
        self.shared = None if shared is None else shared.weight.to(device, self.dtype)

    def activations(self, stream: torch.Tensor, **kwargs) -> tuple[torch.Tensor | None, RoutedActivations]:
        """What the shortcut carries, lifted [..., D], and the inputs of the output layers."""
        hidden_states = stream if self.basis is None else stream @ self.basis
        rows = self.norm(hidden_states).to(self.dtype).flatten(0, -2)
        mixture, shared, weight = self.mixture, None, None
        routing = mixture.route(rows)
        experts = mixture.experts.activations(rows, routing)
        if (one := mixture.shared_expert) is not None:
            shared = one.act_fn(one.gate_proj(rows)) * one.up_proj(rows)
            if (weight := mixture.shared_weight(rows)) is not None:
                weight = weight.squeeze(1)
        carried = stream if self.basis is None else hidden_states @ self.basis.mT
        return carried, RoutedActivations(routing, experts, shared, weight, stream.shape[:-1])

    def members(
        self, activations: RoutedActivations
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Of every expert that writes: its name, its tokens [n], activations [n, K], weights [n] (None for 1), and what
        it writes without bias and weight [n, D]."""
        routing = activations.routing
        for number, rows in routing.groups():
            own = activations.experts[rows]
            yield (
                expert_name(number),
                routing.tokens[rows],
                own,
                routing.weights[rows],
                own @ self.weight[number].mT,
            )
        if activations.shared is not None:
            own = activations.shared
            tokens = torch.arange(len(own), device=own.device)
            yield SHARED, tokens, own, activations.shared_weight, own @ self.shared.mT

    def written(self, activations: RoutedActivations) -> torch.Tensor:
        """What the mixture adds to the stream, [..., D]."""
        rows = grouped_linear(activations.experts, self.weight, self.bias, activations.routing)
        written = activations.routing.combine(rows)
        if activations.shared is not None:
            shared, weight = activations.shared @ self.shared.mT, activations.shared_weight
            written = written + (shared if weight is None else shared * weight[:, None])
        return written.unflatten(0, activations.shape)

    def output_size(self, activations: RoutedActivations) -> None:
        """No norm is behind a mixture."""

    def write(self, carried: torch.Tensor | None, activations: RoutedActivations) -> torch.Tensor:
        """The block's output at full width."""
        return carried + self.written(activations)

    def forward(self, stream: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.write(*self.activations(stream, **kwargs))


def routed_to(writers: Sequence[str]) -> list[str]:
    """Those of a block's writers that are chosen by a router."""
    return [name for name in writers if name.startswith("experts.")]
