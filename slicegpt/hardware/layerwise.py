"""Losses of a model that is larger than memory: all windows pass one layer, then the next, so each is read once.

The layers, the embedding, the norms and the head are the model's own modules, which transformers has made; only their
weights come and go. So the losses are those of `slicegpt.modeling.losses.window_losses` on the loaded model, bit for
bit where the head is taken in one piece; in several, the float64 sums over the vocabulary are taken in another order.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from slicegpt.errors import SliceGPTError
from slicegpt.families import DenseSource
from slicegpt.families.packed_source import plain_view
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling.losses import (
    LOGITS_AT_ONCE,
    BatchSize,
    check_finite_losses,
    first_size,
    token_losses,
    window_losses,
)
from slicegpt.modeling.wide_products import products_in_float32
from slicegpt.progress import Progress

# Of the embedding and of the head so many bytes are on the device at a time.
TABLE_BYTES = 1 << 27


def losses_of(
    model: PreTrainedModel | DenseSource,
    windows: torch.Tensor,
    batch_size: BatchSize = 1,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    name: str = "perplexity",
    of: int | None = None,
) -> list[float]:
    """Of each of `windows` [n, s] the sum of its tokens' losses: `window_losses` of a loaded model, where it is;
    `layerwise_losses` on `device` of a source whose tensors are in files. `name` and `of` are what `window_losses`
    takes for its progress."""
    if isinstance(model, DenseSource):
        if not model.in_memory:
            return layerwise_losses(model, windows, batch_size, progress, device, name=name)
        model = model.shell
    return window_losses(model, windows, batch_size, progress, name, of)


def layerwise_losses(
    source: DenseSource,
    windows: torch.Tensor,
    batch_size: BatchSize = 1,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    windows_at_once: int | None = None,
    name: str = "perplexity",
) -> list[float]:
    """As `slicegpt.modeling.losses.window_losses`, of a model that need not fit into memory.

    What is in memory at a time: one layer, the streams of the windows, and `TABLE_BYTES` of the head.

    Args:
        source: a dense or a sliced model.
        windows: token ids [n, s].
        batch_size: windows that pass a layer at a time; "auto": as many as keep a CPU busy.
        progress, name: where to report, and what.
        device: where the layers run; the streams stay on the host.
        windows_at_once: so many windows pass the model together, and the weights are read once for each such group;
            None: as many as have streams that take half of the host's free memory at most.

    Returns:
        Of each window the sum of its tokens' negative log-likelihoods, the first token's left out, in nats.

    Raises:
        SliceGPTError: a loss is not finite, or the model's layers do not follow one another in one list.
    """
    model = LayerwiseModel(source, torch.device(device))
    size = first_size(windows, torch.device("cpu")) if batch_size == "auto" else batch_size
    report, losses = progress or Progress(quiet=True), []
    groups = windows.split(windows_at_once or _windows_that_fit(source, windows))
    layers = len(model.layers) * len(groups)
    stage = report.stage(f"{name}, layer by layer", layers, "layers", windows.numel())
    with torch.no_grad(), products_in_float32(model.device), stage as advance:
        for group in groups:
            losses += model.losses(list(group.split(size)), advance)
    check_finite_losses(losses)
    return losses


def _windows_that_fit(source: DenseSource, windows: torch.Tensor) -> int:
    """Of windows [n, s] so many have streams that take at most half of the host's free memory."""
    width = getattr(source.config, "dense_hidden_size", None) or source.config.hidden_size
    window = max(1, windows.shape[1] * width * source.dtype.itemsize)
    free = free_memory(torch.device("cpu"))
    return max(1, free // 2 // window if free else len(windows))


class _AllCalled(Exception):
    """Every layer has been called; what comes after the last one is not wanted."""


class _Stand(nn.Module):
    """Stands where a layer stood: notes what it is called with, and passes the stream on as it is.

    The last one returns `stream` in its place; without one it ends the pass. `in_tuple`: as the first of a tuple, which
    some models' layers return.
    """

    def __init__(self, last: bool):
        super().__init__()
        self.last = last
        self.call: tuple[torch.Tensor, tuple, dict] | None = None
        self.stream: torch.Tensor | None = None
        self.in_tuple = False

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor | tuple[torch.Tensor]:
        if self.stream is not None:
            return (self.stream,) if self.in_tuple else self.stream
        self.call = hidden_states, args, kwargs
        if self.last:
            raise _AllCalled
        return (hidden_states,) if self.in_tuple else hidden_states


def _change_shape(calls: list[tuple]) -> bool:
    return any(stream.shape != calls[0][0].shape for stream, _, _ in calls)


class LayerwiseModel:
    """A source's model with stands in the place of its layers, which are called one after the other.

    Args:
        source: dense or sliced, from files or in memory; a model in memory is left as it is.
        device: where it runs.

    Raises:
        SliceGPTError: a model whose layers do not follow one another in one list.
    """

    def __init__(self, source: DenseSource, device: torch.device):
        source = plain_view(source)
        self.source, self.device = source, device
        # Modules of our own, with the same parameters.
        kept = {id(parameter): parameter for parameter in source.shell.parameters()}
        self.shell = copy.deepcopy(source.shell, kept).eval()
        self.trunk, self.head = self.shell.base_model, self.shell.get_output_embeddings()
        self.table = self.shell.get_input_embeddings()
        found = [
            (name, module)
            for name, module in self.trunk.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == source.config.num_hidden_layers
        ]
        if self.trunk is self.shell or self.head is None or len(found) != 1:
            raise SliceGPTError(f"{source.name}: {type(self.shell).__name__} cannot be run layer by layer")
        names = {module: name for name, module in self.shell.named_modules()}
        self.trunk_name, self.head_name, self.table_name = (
            names[module] for module in (self.trunk, self.head, self.table)
        )
        self.table_in_trunk = f"{self.table_name}.weight".removeprefix(f"{self.trunk_name}.")
        (path, layers), *_ = found
        self.layers, self.layers_name = list(layers), f"{self.trunk_name}.{path}"
        self.stands = [_Stand(last=layer is layers[-1]) for layer in layers]
        parent, _, attribute = path.rpartition(".")
        setattr(self.trunk.get_submodule(parent), attribute, nn.ModuleList(self.stands))
        self.table.padding_idx = None  # the rows are numbered anew

    def losses(self, batches: list[torch.Tensor], advance) -> list[float]:
        """Of each window of the batches [b, s], the sum of its tokens' losses; `advance(1)` after every layer."""
        rest = self._read(self.trunk_name, without=(self.layers_name, f"{self.table_name}.weight"))
        streams, calls = self._enter(batches, rest)
        for index, layer in enumerate(self.layers):
            weights = self._read(f"{self.layers_name}.{index}")
            for place, stream in enumerate(streams):
                args, kwargs = calls[len(stream)][index]
                out = self._call(layer, weights, stream.to(self.device), *args, **kwargs)
                self._return_in_tuple(isinstance(out, tuple))
                streams[place] = (out[0] if isinstance(out, tuple) else out).to(stream.device)
            del weights
            advance(1)
        return self._leave(batches, streams, rest)

    def _read(self, root: str, without: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """The tensors of a module on the device, by their names in it; none of those that begin with `without`."""
        tensors = self.source.tensors
        return {
            name.removeprefix(f"{root}."): tensors[name].to(self.device)
            for name in tensors
            if name.startswith(f"{root}.") and not name.startswith(without)
        }

    def _call(self, module: nn.Module, weights: dict[str, torch.Tensor], *args, **kwargs):
        """Call a module with `weights` in the place of its own, which hold nothing."""
        # Tied names are told apart: the table is one of some tokens, the head a piece.
        buffers = {name: buffer.to(self.device) for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, buffers | weights, args, kwargs, tie_weights=False)

    def _trunk(self, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the head reads, [b, s, width]."""
        out = self._call(self.trunk, weights, input_ids=ids, use_cache=False)
        return out.last_hidden_state

    def _enter(
        self, batches: list[torch.Tensor], rest: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[int, list[tuple[tuple, dict]]]]:
        """The streams before the first layer; and what the layers are called with besides, for each size of a batch.

        Masks and positions depend on the shape of a batch alone, for no window is padded.
        """
        used, numbers = torch.unique(torch.cat([batch.flatten() for batch in batches]), return_inverse=True)
        weights = rest | {self.table_in_trunk: self._rows_of(used)}
        streams, calls = [], {}
        for batch, ids in zip(batches, numbers.split([batch.numel() for batch in batches]), strict=True):
            seen = self._calls(ids.view(batch.shape), weights)
            if _change_shape(seen) and not self.stands[0].in_tuple:  # the model took a row of the stream: [0]
                self._return_in_tuple(True)
                seen = self._calls(ids.view(batch.shape), weights)
            stream = seen[0][0]
            if _change_shape(seen):
                raise SliceGPTError(f"{self.source.name}: its layers do not pass one stream on")
            streams.append(stream.cpu())
            calls.setdefault(len(batch), [(args, kwargs) for _, args, kwargs in seen])
        for stand in self.stands:
            stand.call = None
        return streams, calls

    def _calls(self, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> list[tuple]:
        """What every layer is called with."""
        with contextlib.suppress(_AllCalled):
            self._trunk(ids.to(self.device), weights)
        return [stand.call for stand in self.stands]

    def _return_in_tuple(self, in_tuple: bool) -> None:
        for stand in self.stands:
            stand.in_tuple = in_tuple

    def _rows_of(self, used: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table, in ascending order; the table is read piece by piece."""
        name = f"{self.table_name}.weight"
        pieces = [
            rows[used[(used >= begin) & (used < begin + len(rows))] - begin]
            for begin, rows in self._pieces(name)
        ]
        return torch.cat(pieces).to(self.device)

    def _pieces(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and the rows of pieces of a table that are `TABLE_BYTES` large."""
        rows, width = self.source.tensors.shape(name)
        step = max(1, TABLE_BYTES // (width * self.source.dtype.itemsize))
        for begin in range(0, rows, step):
            yield begin, self.source.tensors.rows(name, begin, min(begin + step, rows))

    def _leave(
        self, batches: list[torch.Tensor], streams: list[torch.Tensor], rest: dict[str, torch.Tensor]
    ) -> list[float]:
        """The losses of the streams behind the last layer. The head passes piece by piece, each over all tokens."""
        # The model still begins with its embedding, of one row here; nobody looks at what that gives.
        row = torch.zeros(1, self.table.weight.shape[1], dtype=self.source.dtype, device=self.device)
        weights = rest | {self.table_in_trunk: row}
        nowhere = [torch.zeros_like(batch, device=self.device) for batch in batches]
        inside = {f"{self.trunk_name}.{name}": tensor for name, tensor in weights.items()}
        tensors, name = self.source.tensors, f"{self.head_name}.bias"
        bias = tensors[name].to(self.device) if name in tensors else None

        def hidden_states(stream: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            self.stands[-1].stream = stream.to(self.device)
            return self._trunk(ids, weights)

        def all_logits(
            stream: torch.Tensor, ids: torch.Tensor, piece: dict[str, torch.Tensor]
        ) -> torch.Tensor:
            self.stands[-1].stream = stream.to(self.device)
            return self._call(self.shell, inside | piece, input_ids=ids, use_cache=False).logits

        sums = [_LossSums(batch, self.head.weight.shape[0], self.device) for batch in batches]
        plain = None
        for begin, rows in self._pieces(f"{self.head_name}.weight"):
            weight = rows.to(self.device)
            shift = None if bias is None else bias[begin : begin + len(rows)]
            piece = {f"{self.head_name}.weight": weight}
            if shift is not None:
                piece[f"{self.head_name}.bias"] = shift
            # A few architectures do more than apply the head (scaled logits): found out as `window_losses` does.
            if plain is None:
                probe = streams[0][:1, :16], nowhere[0][:1, :16]
                plain = torch.equal(
                    functional.linear(hidden_states(*probe), weight, shift), all_logits(*probe, piece)
                )
                for place in range(len(streams)) if plain else ():
                    states = hidden_states(streams[place], nowhere[place])
                    streams[place] = states[:, :-1].flatten(0, 1).cpu()
            at_once = max(1, LOGITS_AT_ONCE // len(rows))
            for stream, ids, total in zip(streams, nowhere, sums, strict=True):
                if plain:
                    parts = stream.to(self.device).split(at_once)
                    logits = (functional.linear(part, weight, shift) for part in parts)
                else:
                    whole = all_logits(stream, ids, piece)[:, :-1].flatten(0, 1)
                    logits = iter(whole.split(at_once))
                total.add(begin, logits)
            del rows, weight, piece  # before the next one is read
        self.stands[-1].stream = None
        return list(itertools.chain.from_iterable(total.of_windows() for total in sums))


class _LossSums:
    """Losses of a batch's tokens, from logits that come some rows of the vocabulary at a time."""

    def __init__(self, batch: torch.Tensor, vocabulary: int, device: torch.device):
        self.windows, self.vocabulary = len(batch), vocabulary
        self.targets = batch[:, 1:].flatten().to(device)
        self.normaliser = torch.full(self.targets.shape, -torch.inf, dtype=torch.float64, device=device)
        self.own = torch.zeros_like(self.normaliser)

    def add(self, begin: int, logits: Iterator[torch.Tensor]) -> None:
        """Logits [n, rows] of all tokens, part by part, for the rows of the head from `begin` on."""
        first = 0
        for part in logits:
            these = slice(first, first + len(part))
            targets, first = self.targets[these], first + len(part)
            if part.shape[1] == self.vocabulary:
                self.normaliser[these] = token_losses(part, targets)
                continue
            part = part.double()
            self.normaliser[these] = torch.logaddexp(self.normaliser[these], part.logsumexp(dim=-1))
            inside = (targets >= begin) & (targets < begin + part.shape[1])
            rows = inside.nonzero().squeeze(1)
            self.own[these][rows] = part[rows, targets[rows] - begin]

    def of_windows(self) -> list[float]:
        return (self.normaliser - self.own).view(self.windows, -1).sum(dim=1).tolist()
