"""The blocks between the boundaries, as slicing runs them: input weights final, output at full width."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from slicegpt.conversion.folding import WRITERS, fold_writer, output_norm_weight, reader_state
from slicegpt.families import FAMILIES, DenseLayer, Linear
from slicegpt.hardware.scratch import spilled
from slicegpt.modeling import SlicedConfig, WeightlessRMSNorm
from slicegpt.modeling.latent_attention import whole_attention
from slicegpt.modeling.layers import build_mlp
from slicegpt.slicing.mixtures import SHARED, LiftedMixture, mixture_writers

# Bytes at whose multiples PyTorch's tensors begin, on a CPU.
ALIGNMENT = 64

MODULE_NAMES = {"attention": "self_attn", "mlp": "mlp"}
WRITER_NAMES = {"attention": "o_proj", "mlp": "down_proj"}


@dataclass(frozen=True)
class Block:
    """What lies between two boundaries: attention, MLP, or both in parallel.

    Attributes:
        parts: those that remain; none of a block whose parts are all deleted.
        dense_parts: those of the dense model.
        sparse: it is a mixture of experts.
    """

    index: int
    layer: int
    parts: tuple[str, ...]
    dense_parts: tuple[str, ...]
    shortcut: str
    sparse: bool = False

    @property
    def prefix(self) -> str:
        return f"model.layers.{self.layer}"


def blocks_of(config: SlicedConfig) -> list[Block]:
    """The blocks of the network in order."""
    counts = {"attention": config.key_value_heads, "mlp": config.neurons}

    def remaining(layer: int, *parts: str) -> tuple[str, ...]:
        return tuple(part for part in parts if counts[part][layer])

    if config.parallel_blocks:
        both = ("attention", "mlp")
        return [Block(i, i, remaining(i, *both), both, "shortcut") for i in range(config.num_hidden_layers)]
    return [
        Block(
            2 * i + k,
            i,
            remaining(i, part),
            (part,),
            f"{part}_shortcut",
            part == "mlp" and config.is_sparse(i),
        )
        for i in range(config.num_hidden_layers)
        for k, part in enumerate(("attention", "mlp"))
    ]


def fitted_names(config: SlicedConfig, names: Iterable[str]) -> list[str]:
    """Which of a sliced model's tensors depend on the refit's λ: the output weights, dense shortcuts among them."""
    layers, tensors = set(), set()
    for block in blocks_of(config):
        if block.sparse:
            layers.add(f"{block.prefix}.mlp.{SHARED}.down_proj")
            tensors |= {f"{block.prefix}.mlp.experts.down_proj{kind}" for kind in ("", "_bias")}
        layers |= {writer_name(block, part) for part in block.dense_parts}
        if config.shortcuts[block.index] == "dense":
            layers.add(f"{block.prefix}.{block.shortcut}")
    return [name for name in names if name in tensors or name.rpartition(".")[0] in layers]


def writer_name(block: Block, part: str) -> str:
    """The module that writes what a part does: its output projection; of a deleted part, its constant."""
    name = f"{block.prefix}.{MODULE_NAMES[part]}"
    return f"{name}.{WRITER_NAMES[part]}" if part in block.parts else name


class LiftedBlock(nn.Module):
    """A block with its final input weights in the basis of its boundary, all neurons, and its output at full width.

    Takes and returns the stream at full width: `x -> (x V) Vᵀ + block(norm(x V))`, in two steps, so that the
    output weights may be fitted to the activations in between.

    Args:
        basis: V [D, d] float64; None for the identity, which makes it the dense model's block.
        states: of each part that there is, all but its output projection.
        writers: of each part, in order, the output projection at full width; of one that is deleted, without columns. A
            last one, "shortcut", with V itself as its weight, writes what a dense shortcut carries.
        dtype: of the weights and of what passes between them. A stream of a wider one stays in it.
        output_norm: [D], the scale of the norm that what the block writes passes, or None.
    """

    def __init__(
        self,
        config: SlicedConfig,
        block: Block,
        basis: torch.Tensor | None,
        states: dict[str, dict],
        writers: dict[str, Linear],
        dtype: torch.dtype,
        output_norm: torch.Tensor | None = None,
    ):
        super().__init__()
        dense_width = config.dense_hidden_size
        width = dense_width if basis is None else basis.shape[1]
        with torch.device("meta"):
            self.parts = nn.ModuleDict()
            if "attention" in states:
                self.parts["attention"] = whole_attention(config, block.layer, width, dense_width)
            if "mlp" in states:
                neurons = config.dense_neurons[block.layer]
                self.parts["mlp"] = build_mlp(config, block.layer, width, dense_width, neurons)
        for part in states:
            setattr(self.parts[part], WRITER_NAMES[part], nn.Identity())
        self.set_readers(states)
        eps = config.rms_norm_eps * dense_width / width
        self.norm = WeightlessRMSNorm(width, eps) if config.pre_norm else nn.Identity()
        self.output_norm = None if output_norm is None else output_norm.to(dtype)
        self.inner_eps = config.inner_norm_eps
        self.basis = None if basis is None else basis.to(dtype)
        self.dtype, self.device = dtype, next(iter(writers.values())).weight.device
        self.set_writers(writers)
        self.eval()

    def set_readers(self, states: dict[str, dict]) -> None:
        """Take these tensors themselves, of each part all but its output projection."""
        for part, state in states.items():
            self.parts[part].load_state_dict(state, assign=True)

    def set_writers(self, writers: dict[str, Linear]) -> None:
        """Take the output weights [D, K], side by side, and the sum of their biases."""
        weights = [writer.weight.to(self.device, self.dtype) for writer in writers.values()]
        self.weight = weights[0] if len(weights) == 1 and _is_plain(weights[0]) else torch.cat(weights, dim=1)
        biases = [writer.bias for writer in writers.values() if writer.bias is not None]
        self.bias = sum(biases).to(self.dtype) if biases else None
        self.groups = [writer.weight.shape[1] for writer in writers.values()]
        self.writes_shortcut = "shortcut" in writers

    def normed(self, stream: torch.Tensor) -> torch.Tensor:
        """What the input weights are multiplied with, [..., d]."""
        return self.read(stream if self.basis is None else stream @ self.basis)

    def read(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same, of a stream on its basis."""
        return self.norm(hidden_states).to(self.dtype)

    def activations(self, stream: torch.Tensor, **kwargs) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the shortcut carries, lifted [..., D], and the inputs of the writers [..., K]."""
        hidden_states = stream if self.basis is None else stream @ self.basis
        inputs = []
        if self.parts:
            normed = self.read(hidden_states)
        elif not self.writes_shortcut:
            inputs.append(hidden_states[..., :0].to(self.dtype))
        if "attention" in self.parts:
            inputs.append(self.parts["attention"](normed, **kwargs)[0])
        if "mlp" in self.parts:
            inputs.append(self.parts["mlp"](normed))
        if self.writes_shortcut:
            return None, torch.cat([*inputs, hidden_states], dim=-1)
        carried = stream if self.basis is None else hidden_states @ self.basis.mT
        return carried, inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=-1)

    def write(self, carried: torch.Tensor | None, activations: torch.Tensor) -> torch.Tensor:
        """The block's output at full width."""
        written = functional.linear(activations, self.weight, self.bias)
        if self.output_norm is not None:
            written = functional.rms_norm(written, written.shape[-1:], self.output_norm, self.inner_eps)
        return written if carried is None else carried + written

    def output_size(self, activations: torch.Tensor) -> torch.Tensor | None:
        """What the norm behind the block divides its output by, [...], float32 or wider; None where there is none."""
        if self.output_norm is None:
            return None
        written = functional.linear(activations, self.weight, self.bias)
        length = torch.linalg.vector_norm(
            written, dim=-1, dtype=torch.promote_types(written.dtype, torch.float32)
        )
        return (length.square() / written.shape[-1] + self.inner_eps).sqrt()

    def forward(self, stream: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.write(*self.activations(stream, **kwargs))


Lifted = LiftedBlock | LiftedMixture


def file_readers(states: dict[str, dict], lifted: Lifted, folder: str | os.PathLike | None = None) -> None:
    """Move the matrices of `states`, a CPU's, into files of `folder`, and give them to `lifted`.

    They are the same tensors but for their place: what is read of them is in memory until it is written over or given
    back (`slicegpt.hardware.scratch`).
    """
    for part, state in states.items():
        states[part] = {
            name: spilled(tensor, folder) if tensor.dim() > 1 else tensor for name, tensor in state.items()
        }
    lifted.set_readers(states)


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight lies in memory as a copy would, so that products with it are the same bits."""
    return weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0


def dense_writers(
    config: SlicedConfig, block: Block, layer: DenseLayer, device: torch.device
) -> dict[str, Linear]:
    """Of each part of the dense model's block, its output projection [D, K] with the mean subtraction folded in, see
    `fold_writer`; of a mixture those of every expert."""
    centred = FAMILIES[config.source_model_type].mean_subtraction
    if block.sparse:
        return mixture_writers(layer.mixture, centred, device)
    return {
        part: fold_writer(getattr(layer, WRITERS[part][1]), centred, device) for part in block.dense_parts
    }


def remaining_writers(block: Block, writers: dict[str, Linear]) -> dict[str, Linear]:
    """The same; a deleted part's has no columns, and a bias whatever the family: the constant that is fitted."""
    if block.sparse:
        return writers
    remaining = {}
    for part, writer in writers.items():
        if part not in block.parts:
            bias = writer.bias
            if bias is None:
                bias = writer.weight.new_zeros(len(writer.weight), dtype=torch.float64)
            writer = Linear(writer.weight[:, :0], bias)
        remaining[part] = writer
    return remaining


def group_rows(config: SlicedConfig) -> list[slice]:
    """The columns of attention's output projection that each of the dense model's key/value groups has; in a block,
    attention's come first."""
    size = config.num_attention_heads // config.num_key_value_heads * config.value_dim
    return [slice(size * group, size * (group + 1)) for group in range(config.num_key_value_heads)]


# Of the largest scale of a norm behind a block, what its smaller ones count as in the fit, at the least.
SMALLEST_SCALE = 1e-3


def fitted_scale(block: Block, layer: DenseLayer, device: torch.device) -> torch.Tensor | None:
    """The scale `g` [D] of the norm behind a block, float64, none of it near 0; None where there is no such norm.

    A block with one writes `g y / rms(y)`, `y = a W`. What is fitted is `W diag(g)`: an error of a column then counts
    as it does in the stream, see `slicegpt.slicing.objective`.
    """
    scale = output_norm_weight(block.dense_parts[0], layer, device)
    if scale is None:
        return None
    least = max(SMALLEST_SCALE * scale.abs().max().item(), torch.finfo(torch.float32).tiny)
    return torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp(min=least)


def scaled_writers(writers: dict[str, Linear], scale: torch.Tensor | None) -> dict[str, Linear]:
    """Output weights [D, K] with their rows multiplied by `scale` [D], float64; as they are where it is None."""
    if scale is None:
        return dict(writers)
    return {
        part: Linear(
            writer.weight.double() * scale[:, None],
            None if writer.bias is None else writer.bias.double() * scale,
        )
        for part, writer in writers.items()
    }


def neuron_rows(writers: dict[str, Linear]) -> slice:
    """The columns of the writers side by side, those of the refit's activations, that the MLP's neurons are."""
    start = 0
    for part, writer in writers.items():
        if part == "mlp":
            return slice(start, start + writer.weight.shape[1])
        start += writer.weight.shape[1]
    raise KeyError("mlp")


def dense_block(
    config: SlicedConfig,
    block: Block,
    layer: DenseLayer,
    writers: dict[str, Linear],
    dtype: torch.dtype,
    device: torch.device,
) -> Lifted:
    """The dense model's block, at full width, with the `writers` of its parts."""
    states = {part: reader_state(part, layer, None, dtype, device) for part in block.dense_parts}
    output_norm = output_norm_weight(block.dense_parts[0], layer, device)
    return lifted_block(config, block, None, states, writers, dtype, output_norm)


def lifted_block(
    config: SlicedConfig,
    block: Block,
    basis: torch.Tensor | None,
    states: dict[str, dict],
    writers: dict[str, Linear],
    dtype: torch.dtype,
    output_norm: torch.Tensor | None = None,
) -> Lifted:
    """A block as slicing runs it, see `LiftedBlock`; one that is a mixture of experts, see `LiftedMixture`."""
    if block.sparse:
        return LiftedMixture(config, block.layer, basis, states["mlp"], writers, dtype)
    return LiftedBlock(config, block, basis, states, writers, dtype, output_norm)
