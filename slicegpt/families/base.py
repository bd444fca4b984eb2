"""What a family is: where a Hugging Face checkpoint keeps its weights, and the few facts its config carries."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from .source import Weights

# What transformers' xIELU keeps.
ACTIVATION_STATE = ("alpha_p", "alpha_n", "beta", "eps")


@dataclass(frozen=True)
class Linear:
    """A linear layer of the checkpoint: `weight` [out, in], `bias` [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """Scale and shift [D] of a LayerNorm or RMSNorm; None where the checkpoint has none."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Expert:
    """The three layers of a gated MLP, one of several."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in place of an MLP.

    Attributes:
        router: [experts, D].
        count: of the experts.
        expert: reads one of them, by its number.
        correction: what is added to the scores before the choice, [experts], or None.
        shared: the expert that writes for every token, or None; its factor's logit [1, D], or None.
    """

    router: Linear
    count: int
    expert: Callable[[int], Expert]
    correction: torch.Tensor | None = None
    shared: Expert | None = None
    shared_gate: Linear | None = None


@dataclass(frozen=True)
class DenseLayer:
    """One transformer layer of the checkpoint. In parallel layers both norms are the same one.

    `attention_output_norm`, `mlp_output_norm`: of what the parts write, behind their output projections.
    `activation`: the state of an activation that has weights of its own (xIELU), by the names of its module.
    `mixture`: takes the place of `gate`, `up` and `down`, which are then None.
    `sinks`: of every head, a score that belongs to no token, [heads].
    `kv_a`: of latent attention, which has neither `k` nor `v`, [latent + rotated part of the key, D]; `q_a`: of one
    that compresses queries as well, in place of `q`. `expansion`: what is behind them, by the names of the canonical
    module.
    """

    attention_norm: Norm
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear
    mlp_norm: Norm
    gate: Linear | None
    up: Linear | None
    down: Linear | None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    mixture: Mixture | None = None
    sinks: torch.Tensor | None = None
    activation: Mapping[str, torch.Tensor] = field(default_factory=dict)
    q_a: Linear | None = None
    kv_a: Linear | None = None
    expansion: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MixtureNames:
    """Where a layer keeps its experts: side by side in tensors [experts, out, in], gate above up in the first.

    Attributes:
        by_turns: the tensors are [experts, in, out], and gate and up stand by turns (gpt-oss).
        shared: the module of the expert that writes for every token; shared_gate: of its factor.
    """

    router: str = "mlp.gate"
    gate_up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    by_turns: bool = False
    shared: str | None = None
    shared_gate: str | None = None

    def tensors(self) -> set[str]:
        """All names that a layer's tensors may have."""
        names = {f"{self.router}.{kind}" for kind in ("weight", "bias", "e_score_correction_bias")}
        names |= {f"{part}{kind}" for part in (self.gate_up, self.down) for kind in ("", "_bias")}
        names |= {f"{self.shared}.{part}_proj.weight" for part in ("gate", "up", "down")}
        return names | {f"{self.shared_gate}.weight"}


@dataclass(frozen=True)
class LayerNames:
    """Names of a layer's modules below the layer's own; None where the family has no such part.

    `experts`: of the layers that have a router by its name there; the others have an MLP. `expansion`: modules of a
    weight alone, called in the canonical network what the last part of their name says.
    """

    attention_norm: str | None
    q: str | None
    k: str | None
    v: str | None
    o: str
    mlp_norm: str | None
    up: str
    down: str
    gate: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    activation: str | None = None
    experts: MixtureNames | None = None
    sinks: str | None = None
    q_a: str | None = None
    kv_a: str | None = None
    expansion: tuple[str, ...] = ()


@dataclass(frozen=True)
class StockForm:
    """How the canonical network is written in the family's own class: what undoes `Family.facts` and `rewrite_layer`.

    Attributes:
        neurons: the name that the family's config has for the neurons of an MLP.
        eps: the name that it has for the epsilon of its norms, where they are RMS norms.
        eps_factor: of a width, what this epsilon is of the canonical network's.
        fields: of a config, what else changes in it: a factor that the canonical weights hold is 1 from then on.
        restore_layer: a canonical layer in the checkpoint's own way of writing, by the config of the stock model; parts
            that one module holds together are then the same layer.
        norm_offset: what is added to the scale that a norm's weight holds: 1 where it holds the scale less 1.
    """

    neurons: str = "intermediate_size"
    eps: str = "rms_norm_eps"
    eps_factor: Callable[[int], float] = lambda width: 1.0
    fields: Callable[[PreTrainedConfig], dict] = lambda config: {}
    restore_layer: Callable[[DenseLayer, PreTrainedConfig], DenseLayer] | None = None
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """A model architecture, as the canonical network sees it.

    Attributes:
        architectures: Hugging Face class names, as in `config.architectures`.
        facts: the fields of `SlicedConfig` that the checkpoint's config determines; raises `SliceGPTError`
            for variants that the canonical network cannot represent.
        layer: where its weights are, or a function of the config that tells. Parts that one module holds together have
            the same name.
        mean_subtraction: LayerNorm family: `M = I - 1 1ᵀ / D` is folded into every layer that writes the stream.
        embedding, positions, layers, final_norm, head: module names; `layers` holds one `{}`.
        rewrite_layer: brings a layer, as its names read it, into the canonical form: fused projections taken apart,
            factors that stand outside of the weights folded in, rotary pairs reordered (`slicegpt.families.rewriting`).
        rewrite_final_norm: the same for the last norm.
        stock: the way back, see `slicegpt.conversion.stock`.
    """

    model_type: str
    architectures: tuple[str, ...]
    facts: Callable[[PreTrainedConfig], dict]
    layer: LayerNames | Callable[[PreTrainedConfig], LayerNames]
    mean_subtraction: bool
    embedding: str
    layers: str
    final_norm: str
    head: str = "lm_head"
    positions: str | None = None
    rewrite_layer: Callable[[DenseLayer, PreTrainedConfig], DenseLayer] | None = None
    rewrite_final_norm: Callable[[Norm, PreTrainedConfig], Norm] | None = None
    stock: StockForm = StockForm()


def head_dim_of(config: PreTrainedConfig) -> int:
    """Entries of an attention head."""
    head_dim = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if head_dim is None else head_dim


class Checkpoint:
    """A dense model's tensors, read by their canonical names.

    Args:
        tensors: any mapping from checkpoint names to tensors: a module's `state_dict()`, or the tensors of a
            `slicegpt.families.DenseSource`, which are read from their files at every access.
        config: the checkpoint's.
        tied: whether the head is the embedding table; None: found out from the config and the tensors.
    """

    def __init__(
        self,
        family: Family,
        tensors: Mapping[str, torch.Tensor],
        config: PreTrainedConfig,
        tied: bool | None = None,
    ):
        self.family = family
        self.tensors = tensors
        self.config = config
        self.names = family.layer(config) if callable(family.layer) else family.layer
        if tied is not None:
            self.tied = tied  # takes the place of the cached property

    def _get(self, name: str) -> torch.Tensor | None:
        return self.tensors[name] if name in self.tensors else None  # noqa: SIM401  (a Mapping need not have get)

    def _linear(self, name: str) -> Linear:
        return Linear(self.tensors[f"{name}.weight"], self._get(f"{name}.bias"))

    def _norm(self, name: str) -> Norm:
        return Norm(self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _activation(self, name: str) -> dict[str, torch.Tensor]:
        state = {part: self._get(f"{name}.{part}") for part in ACTIVATION_STATE}
        return {part: tensor for part, tensor in state.items() if tensor is not None}

    @property
    def embedding(self) -> torch.Tensor:
        """Token embedding table [vocab_size, D]."""
        return self.tensors[f"{self.family.embedding}.weight"]

    @property
    def positions(self) -> torch.Tensor | None:
        """Learned position table [positions + offset, D], or None."""
        return None if self.family.positions is None else self.tensors[f"{self.family.positions}.weight"]

    @property
    def final_norm(self) -> Norm:
        norm, rewrite = self._norm(self.family.final_norm), self.family.rewrite_final_norm
        return norm if rewrite is None else rewrite(norm, self.config)

    @property
    def head(self) -> Linear:
        """Language-modelling head; a tied one is the embedding table."""
        name = self.family.head
        weight = self.embedding if self.tied else self.tensors[f"{name}.weight"]
        return Linear(weight, self._get(f"{name}.bias"))

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding table.

        The config's flag alone does not say so: where a file holds a head of its own beside the flag (training that
        saved both leaves it), transformers keeps both.
        """
        if not self.config.tie_word_embeddings:
            return False
        own, table = self._get(f"{self.family.head}.weight"), self.embedding
        return own is None or own is table or own.is_meta or torch.equal(own, table)

    def unread(self) -> list[str]:
        """Names of the tensors that the family has no place for: slicing would drop them."""
        family, names = self.family, self.names
        weights = (names.q_norm, names.k_norm)
        others = ("q_norm", "k_norm", "activation", "experts", "sinks", "expansion")
        whole = {value for name, value in vars(names).items() if name not in others}
        parts = {f"{part}.{kind}" for part in whole - {None} for kind in ("weight", "bias")}
        parts |= {f"{part}.weight" for part in (*weights, *names.expansion) if part is not None}
        parts |= {f"{names.activation}.{name}" for name in ACTIVATION_STATE} | {names.sinks}
        parts |= set() if names.experts is None else names.experts.tensors()
        known = {f"{family.embedding}.weight", f"{family.positions}.weight"}
        known |= {
            f"{part}.{kind}" for part in (family.final_norm, family.head) for kind in ("weight", "bias")
        }
        for index in range(self.config.num_hidden_layers):
            known |= {f"{family.layers.format(index)}.{part}" for part in parts}
        return sorted(set(self.tensors) - known)

    def layer(self, index: int) -> DenseLayer:
        names, root = self.names, self.family.layers.format(index)
        # A fused projection bears several names, and is to be read once.
        linear = functools.cache(lambda name: self._linear(f"{root}.{name}"))

        def own(name: str | None) -> Linear | None:
            return None if name is None else linear(name)

        def norm(name: str | None) -> Norm | None:
            return None if name is None else self._norm(f"{root}.{name}")

        norms = [
            None if name is None else self._get(f"{root}.{name}.weight")
            for name in (names.q_norm, names.k_norm)
        ]
        mixture = self._mixture(root)
        mlp = (None, None, None) if mixture is not None else (names.gate, names.up, names.down)
        gate, up, down = map(own, mlp)
        layer = DenseLayer(
            attention_norm=norm(names.attention_norm) or Norm(),
            q=own(names.q),
            k=own(names.k),
            v=own(names.v),
            o=linear(names.o),
            mlp_norm=norm(names.mlp_norm) or Norm(),
            gate=gate,
            up=up,
            down=down,
            q_norm=norms[0],
            k_norm=norms[1],
            attention_output_norm=norm(names.attention_output_norm),
            mlp_output_norm=norm(names.mlp_output_norm),
            activation=self._activation(f"{root}.{names.activation}"),
            mixture=mixture,
            sinks=None if names.sinks is None else self._get(f"{root}.{names.sinks}"),
            q_a=own(names.q_a),
            kv_a=own(names.kv_a),
            expansion={
                f"{name.rpartition('.')[2]}.weight": self.tensors[f"{root}.{name}.weight"]
                for name in names.expansion
            },
        )
        rewrite = self.family.rewrite_layer
        return layer if rewrite is None else rewrite(layer, self.config)

    def _mixture(self, root: str) -> Mixture | None:
        """The experts of a layer; None where it has none."""
        names = self.names.experts
        if names is None or f"{root}.{names.router}.weight" not in self.tensors:
            return None
        linear = functools.partial(self._linear_of, root)
        shared = None
        if names.shared is not None and f"{root}.{names.shared}.up_proj.weight" in self.tensors:
            shared = Expert(*(linear(f"{names.shared}.{part}_proj") for part in ("gate", "up", "down")))
        return Mixture(
            router=linear(names.router),
            count=self.tensors[f"{root}.{names.router}.weight"].shape[0],
            expert=functools.partial(self._expert, root, names),
            correction=self._get(f"{root}.{names.router}.e_score_correction_bias"),
            shared=shared,
            shared_gate=None if names.shared_gate is None else linear(names.shared_gate),
        )

    def _linear_of(self, root: str, name: str) -> Linear:
        return self._linear(f"{root}.{name}")

    def _expert(self, root: str, names: MixtureNames, number: int) -> Expert:
        def read(name: str) -> torch.Tensor | None:
            key = f"{root}.{name}"
            if key not in self.tensors:
                return None
            if isinstance(self.tensors, Weights):  # no more than the one is read
                return self.tensors.rows(key, number, number + 1)[0]
            return self.tensors[key][number]

        weight, bias = read(names.gate_up), read(f"{names.gate_up}_bias")
        down = Linear(read(names.down), read(f"{names.down}_bias"))
        if names.by_turns:
            gate, up = (
                Linear(weight[:, part::2].mT, None if bias is None else bias[part::2]) for part in (0, 1)
            )
            return Expert(gate, up, Linear(down.weight.mT, down.bias))
        half = len(weight) // 2
        gate, up = (
            Linear(weight[part], None if bias is None else bias[part])
            for part in (slice(half), slice(half, None))
        )
        return Expert(gate, up, down)
