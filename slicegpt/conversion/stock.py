"""The stock form: a sliced model as one of the dense model's own class, which loads where this package never was.

Where all boundaries share one basis `V` [D, d], every shortcut is the identity, and what is left is a dense network of
width d: its norms divide by d in place of D, which an epsilon of `eps D / d` and a factor `sqrt(D / d)` in the layers
that read them make up for (`slicegpt.conversion.folding`), and their scales are 1. A class has one number of neurons
for all layers. A head that is tied to the embedding cannot be sliced so, because `E V` would have to serve both ends,
nor a LayerNorm, which subtracts the mean over d columns in place of D: those models keep their width and give neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slicegpt.errors import SliceGPTError, first_line
from slicegpt.families import FAMILIES, Checkpoint, DenseLayer, DenseSource, Family, Linear, Norm
from slicegpt.modeling import SlicedConfig
from slicegpt.modeling.sizes import skeleton

# What a layer's parts are called in the canonical network.
_LAYERS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_READERS = {"attention_norm": ("q", "k", "v"), "mlp_norm": ("gate", "up")}


def keeps_width(fields: dict) -> str | None:
    """Why a model of the stock form must be as wide as the dense one; None where it need not.

    Args:
        fields: `slicegpt.families.canonical_fields` of the dense model.
    """
    if FAMILIES[fields["source_model_type"]].mean_subtraction:
        return "a LayerNorm subtracts the mean over all columns"
    if fields["tie_word_embeddings"]:
        return "its head is tied to the embedding"
    return None


def check_form(config: SlicedConfig) -> None:
    """Refuse what the class of no dense model can hold.

    Raises:
        SliceGPTError: experts, shortcuts, or layers of different numbers of neurons or of heads.
    """
    if config.num_experts:
        raise SliceGPTError("the stock form has no mixtures of experts; slice without it", "form")
    if config.kv_lora_rank is not None:
        raise SliceGPTError(
            f"{config.source_model_type} has latent attention, and no stock form here", "form"
        )
    if config.attention_sinks:
        raise SliceGPTError(f"{config.source_model_type} has attention sinks, and no stock form here", "form")
    if config.post_norm:
        raise SliceGPTError(
            f"{config.source_model_type} normalises what its blocks write, which has no stock form here",
            "form",
        )
    shortcuts = sorted(set(config.shortcuts) - {"identity"})
    if shortcuts:
        raise SliceGPTError(
            f"the stock form has no shortcuts, got {' and '.join(shortcuts)} ones; slice with --form stock",
            "form",
        )
    if len(set(config.neurons)) > 1:
        raise SliceGPTError(
            "the stock form has one number of neurons in all layers, got"
            f" {min(config.neurons)} to {max(config.neurons)}; slice with --form stock",
            "form",
        )
    if len(set(config.attention_heads)) > 1:
        raise SliceGPTError(
            "the stock form has one number of query heads in all layers, got"
            f" {min(config.attention_heads)} to {max(config.attention_heads)}; slice with --form stock",
            "form",
        )
    if len(set(config.key_value_heads)) > 1:
        raise SliceGPTError(
            "the stock form has one number of key/value heads in all layers, got"
            f" {min(config.key_value_heads)} to {max(config.key_value_heads)}; slice with --form stock",
            "form",
        )


def stock_config(config: SlicedConfig, source: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """The config of the stock model.

    Args:
        config: of the sliced model, of one width, without shortcuts.
        source: the dense model's; it is not changed.
        dtype: of the weights.

    Raises:
        SliceGPTError: `check_form`; or the class's own config refuses the width.
    """
    check_form(config)
    family, width = FAMILIES[config.source_model_type], config.boundary_widths[0]
    stock = family.stock
    changes = {"tie_word_embeddings": config.tie_word_embeddings, stock.neurons: config.intermediate_size}
    changes |= stock.fields(source)
    if width != config.dense_hidden_size:
        changes |= {"hidden_size": width, "head_dim": config.head_dim}
    if not config.keeps_all_heads:
        changes |= {
            "num_attention_heads": config.attention_heads[0],
            "num_key_value_heads": config.key_value_heads[0],
            "head_dim": config.head_dim,
        }
    if not family.mean_subtraction:
        eps, known = config.boundary_eps(0) * stock.eps_factor(width), getattr(source, stock.eps)
        changes[stock.eps] = known if math.isclose(eps, known, rel_tol=1e-12) else eps
    plain = {
        name: value
        for name, value in source.to_dict().items()
        if name not in ("quantization_config", "auto_map", "_name_or_path", "transformers_version")
    }
    changes |= {"dtype": str(dtype).removeprefix("torch.")}
    try:
        return type(source).from_dict(plain | changes)
    except Exception as error:  # every config class validates in its own way
        reason = " ".join(str(error).split())
        raise SliceGPTError(
            f"{type(source).__name__} has no stock form of width {width}: {reason}", "form"
        ) from error


@dataclass(frozen=True)
class StockModel:
    """A sliced model's tensors under the names of its family's class.

    Args:
        config: of the sliced model.
        stock: `stock_config` of it.
        expected: shape of every entry of the class's state, a tied head left out.
        tensors: the sliced model's state; they may be on the meta device.
        checkpoint: the dense model; of its tensors only norms are read, and only where the class has no place for the
            biases that their shifts were folded into.
    """

    config: SlicedConfig
    stock: PreTrainedConfig
    expected: Mapping[str, torch.Size]
    tensors: Mapping[str, torch.Tensor]
    checkpoint: Checkpoint

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every entry of the class's state once, a layer at a time.

        Raises:
            SliceGPTError: the class has no place for one, or one of another shape; or it has others.
        """
        left = dict(self.expected)
        for name, tensor in self._entries():
            if name not in left or left[name] != tensor.shape:
                place = list(left[name]) if name in left else "no place"
                raise SliceGPTError(
                    f"{type(self.stock).__name__} has no stock form of this shape: its class has {place} for {name},"
                    f" which is {list(tensor.shape)}",
                    "form",
                )
            del left[name]
            yield name, tensor
        if left:
            raise SliceGPTError(
                f"{type(self.stock).__name__} has no stock form: its class has {', '.join(sorted(left)[:3])}",
                "form",
            )

    def _entries(self) -> Iterator[tuple[str, torch.Tensor]]:
        family = self.checkpoint.family
        yield f"{family.embedding}.weight", self.tensors["model.embed_tokens.weight"]
        if family.positions is not None:
            yield f"{family.positions}.weight", self.tensors["model.embed_positions.weight"]
        for index in range(self.config.num_hidden_layers):
            yield from self._layer(index)
        yield from self._head()

    def _linear(self, name: str) -> Linear | None:
        if f"{name}.weight" not in self.tensors:
            return None
        bias = f"{name}.bias"
        return Linear(self.tensors[f"{name}.weight"], self.tensors.get(bias))

    def _layer(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        names, family = self.checkpoint.names, self.checkpoint.family
        prefix, root = f"model.layers.{index}", family.layers.format(index)
        parts = {part: self._linear(f"{prefix}.{name}") for part, name in _LAYERS.items()}
        norms = self._norms(index, parts)
        queries = {
            own: self.tensors[f"{prefix}.self_attn.{own}.weight"]
            for own in ("q_norm", "k_norm")
            if f"{prefix}.self_attn.{own}.weight" in self.tensors
        }
        if queries:
            parts |= {own: self._unscaled(parts[own]) for own in ("q", "k")}
        layer = DenseLayer(**parts, **norms, **queries)
        if family.stock.restore_layer is not None:
            layer = family.stock.restore_layer(layer, self.stock)
        dtype, written = parts["o"].weight.dtype, set()
        if self._norm_name(index, "mlp_norm") == names.attention_norm:
            written.add(names.mlp_norm)
            yield from self._norm(f"{root}.{names.attention_norm}", layer.attention_norm, dtype)
            written.add(names.attention_norm)
        for part, name in vars(names).items():
            if name is None or name in written or part in ("activation", "expansion"):
                continue
            written.add(name)
            value = getattr(layer, part)
            if isinstance(value, Norm):
                yield from self._norm(f"{root}.{name}", value, dtype)
            elif isinstance(value, torch.Tensor):
                yield f"{root}.{name}.weight", value
            elif value is not None:
                yield f"{root}.{name}.weight", value.weight.to(dtype).contiguous()
                if value.bias is not None:
                    yield f"{root}.{name}.bias", value.bias.to(dtype).contiguous()
        if names.activation is not None:
            beginning = f"{prefix}.mlp.act_fn."
            for name in self.tensors:
                if name.startswith(beginning):
                    yield f"{root}.{names.activation}.{name.removeprefix(beginning)}", self.tensors[name]

    def _unscaled(self, linear: Linear) -> Linear:
        """Queries or keys before their norm, whose epsilon is the config's one and grew with it, by `D / d`.

        `sqrt(D / d)` times as large they give what they gave. Numbers of 16 bits, which would be rounded again, stay:
        what the epsilon changes, 1e-7 of a head's entries at 1e-6, is less than their rounding.
        """
        factor = (self.config.dense_hidden_size / self.config.boundary_widths[0]) ** 0.5
        if factor == 1 or linear.weight.dtype.itemsize == 2:
            return linear
        bias = None if linear.bias is None else linear.bias.double() * factor
        return Linear(linear.weight.double() * factor, bias)

    # --- norms -------------------------------------------------------------------------------------------------

    def _norm_name(self, index: int, norm: str) -> str:
        """The name of the norm that attention or MLP read: parallel ones may share one, whatever the other's name."""
        names, root = self.checkpoint.names, self.checkpoint.family.layers.format(index)
        if self.config.parallel_blocks and f"{root}.{names.mlp_norm}.weight" not in self.expected:
            return names.attention_norm
        return getattr(names, norm)

    def _norms(self, index: int, parts: dict[str, Linear | None]) -> dict[str, Norm]:
        """The norms of a layer: weightless, for what they did is in the layers that read them.

        Where the class has no bias for a shift `β` that went into one, the norm keeps it, as `β / g`; the biases of the
        layers that read it, in `parts`, are then those that they had of their own.
        """
        names, root = self.checkpoint.names, self.checkpoint.family.layers.format(index)
        shifts: dict[str, torch.Tensor] = {}
        dense = None
        for norm, readers in _READERS.items():
            homeless = [
                part
                for part in readers
                if parts[part] is not None
                and parts[part].bias is not None
                and f"{root}.{getattr(names, part)}.bias" not in self.expected
            ]
            if homeless:
                dense = self.checkpoint.layer(index) if dense is None else dense
                shifts[self._norm_name(index, norm)] = self._shift(getattr(dense, norm), homeless[0])
        norms = {}
        for norm, readers in _READERS.items():
            shift = shifts.get(self._norm_name(index, norm))
            norms[norm] = Norm(None, shift)
            for part in readers:
                if shift is not None and parts[part] is not None:
                    parts[part] = self._own_bias(f"{root}.{getattr(names, part)}", parts[part], shift)
        return norms

    def _shift(self, norm: Norm, part: str) -> torch.Tensor:
        """`β / g` of a norm [D], float64."""
        if norm.bias is None:
            raise SliceGPTError(
                f"{type(self.stock).__name__} has no stock form: its class has no bias for {part}", "form"
            )
        scale = torch.ones_like(norm.bias) if norm.weight is None else norm.weight
        shift, scale = norm.bias.double(), scale.double()
        if not shift.is_meta and bool(((scale == 0) & (shift != 0)).any()):
            raise SliceGPTError(
                f"{type(self.stock).__name__} has no stock form: a norm with a scale of 0 has a shift", "form"
            )
        return torch.where(scale == 0, 0.0, shift / scale)

    def _own_bias(self, name: str, linear: Linear, shift: torch.Tensor) -> Linear:
        """A layer without what a norm's shift added to its bias; None where the class has none."""
        if linear.bias is None or f"{name}.bias" not in self.expected:
            return replace(linear, bias=None)
        return replace(linear, bias=linear.bias.double() - linear.weight.double() @ shift)

    def _norm(self, name: str, norm: Norm, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Entries of a norm: its scale (None: 1) and shift (None: 0), as far as the class has them."""
        offset = self.checkpoint.family.stock.norm_offset
        for kind, value, default in (("weight", norm.weight, 1.0), ("bias", norm.bias, 0.0)):
            full = f"{name}.{kind}"
            if value is None and full in self.expected:
                device = self.tensors["model.embed_tokens.weight"].device
                value = torch.full(self.expected[full], default, dtype=torch.float64, device=device)
            if value is not None:
                yield full, (value.double() + (offset if kind == "weight" else 0.0)).to(dtype)

    def _head(self) -> Iterator[tuple[str, torch.Tensor]]:
        family, tied = self.checkpoint.family, self.config.tie_word_embeddings
        dtype = self.tensors["model.embed_tokens.weight"].dtype
        bias = self.tensors.get("lm_head.bias")
        if tied:
            # A family without scales has one in the canonical network all the same.
            own = self.checkpoint.final_norm.weight is not None
            scale = self.tensors["model.norm.weight"] if own else None
            shift = self.tensors.get("model.norm.bias")
            yield from self._norm(family.final_norm, Norm(scale, shift), dtype)
        else:
            head = Linear(self.tensors["lm_head.weight"], bias)
            shift = None
            if bias is not None and f"{family.head}.bias" not in self.expected:
                shift = self._shift(self.checkpoint.final_norm, family.head)
                bias = None
            yield from self._norm(family.final_norm, Norm(None, shift), dtype)
            yield f"{family.head}.weight", head.weight
        if bias is not None:
            yield f"{family.head}.bias", bias.to(dtype)


def expected_state(stock: PreTrainedConfig, family: Family) -> dict[str, torch.Size]:
    """Shape of every entry of the state of a config's class, a tied head left out.

    Raises:
        SliceGPTError: transformers cannot make such a model.
    """
    shapes = {name: tensor.shape for name, tensor in _skeleton(stock).state_dict().items()}
    if stock.tie_word_embeddings:
        shapes.pop(f"{family.head}.weight", None)
    return shapes


def stock_parameters(config: SlicedConfig, source: PreTrainedConfig) -> int:
    """Elements that the stock form of a sliced model stores.

    Args:
        source: the dense model's config.
    """
    model = _skeleton(stock_config(config, source, torch.float32))
    return sum(parameter.numel() for parameter in model.parameters())


def _skeleton(stock: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: all shapes, no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(stock)
    except Exception as error:  # a model's constructor validates nothing, and fails anywhere
        raise SliceGPTError(
            f"{type(stock).__name__} has no stock form of this shape: {first_line(error)}", "form"
        ) from error


def stock_model_of(
    config: SlicedConfig, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> StockModel:
    """A sliced model, its class found; see `StockModel`."""
    stock = stock_config(config, checkpoint.config, dtype)
    return StockModel(config, stock, expected_state(stock, checkpoint.family), tensors, checkpoint)


def check_stock(config: SlicedConfig, dense: DenseSource) -> None:
    """Refuse, before anything is sliced, what the class of the dense model cannot hold; no weight is read.

    Raises:
        SliceGPTError: it cannot; the line says what of it.
    """
    shapes = {name: tensor.to("meta") for name, tensor in dense.shell.state_dict().items()}
    checkpoint = Checkpoint(
        FAMILIES[config.source_model_type], shapes, dense.config, config.tie_word_embeddings
    )
    state = skeleton(config).to(dense.dtype).state_dict()
    for _ in stock_model_of(config, dense.dtype, state, checkpoint).state():
        pass
