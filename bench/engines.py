"""Engines: the ways in which a network's next tokens are computed, all behind one interface.

The dense model also runs in Hugging Face's own class, so that a sliced model is compared with the best that its users
have today, and not with this package's idea of it.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from slicegpt.bench.memory import is_out_of_memory
from slicegpt.bench.networks import Network
from slicegpt.errors import SliceGPTError
from slicegpt.loading import first_line
from slicegpt.runtime import Runtime, Sampling
from slicegpt.runtime.cache import KVCache
from slicegpt.runtime.decoding import GraphDecoder, GrowingDecoder
from slicegpt.runtime.engine import CAPACITY_STEP


class NotApplicable(Exception):
    """An engine cannot run a network here; the message is the reason, for the table."""


class Decoder(ABC):
    """One greedy generation of a batch, in progress. The tokens stay on the device.

    Attributes:
        weight_bytes: of the weights that every step reads.
        stored_bytes: of all weights that this engine keeps.
        tokens: [batch, 1], the last ones chosen.
    """

    weight_bytes: int
    stored_bytes: int
    tokens: Tensor

    @abstractmethod
    def prompt(self, ids: Tensor) -> None:
        """Process a prompt [batch, tokens] and choose the token after it."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Instead of a prompt: a cache as after `context` tokens, of random keys and values."""

    @abstractmethod
    def step(self) -> None:
        """Read the last tokens, choose the next."""

    def resume(self) -> None:  # noqa: B027 (most engines need nothing)
        """Called before a series of steps, where engines that share a model have taken turns."""


class CachedModel(Decoder):
    """A Hugging Face model with a key-value cache: dynamic, as `generate()` takes it, or static."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        length: int,
        attention: str = "sdpa",
        cache: str = "dynamic",
        compiled: bool = False,
    ):
        self.model, self.batch, self.attention = model, batch, attention
        self.weight_bytes = bytes_read(model)
        self.stored_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if cache == "static":
            self.cache = StaticCache(config=model.config, max_cache_len=length)
        else:
            self.cache = DynamicCache(config=model.config)
        self.forward = model
        if compiled:
            # Every network and batch is compiled anew, on purpose; the default limit is for accidents.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self.forward = torch.compile(model.forward, mode=mode, dynamic=False, fullgraph=True)
        self.tokens = torch.full((batch, 1), 5, device=model.device)
        self.resume()

    def resume(self) -> None:
        self.model.set_attn_implementation(self.attention)

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> None:
        # Not compiled: a prompt's length is seldom seen twice.
        self._choose(self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def fill(self, context: int) -> None:
        config, model = self.model.config, self.model
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(
                2, self.batch, heads, context, width, dtype=model.dtype, device=model.device
            )
            self.cache.update(keys, values, layer)

    @torch.no_grad()
    def step(self) -> None:
        self._choose(self.forward(self.tokens, past_key_values=self.cache, use_cache=True))

    def _choose(self, output) -> None:
        self.tokens = output.logits[:, -1:].argmax(dim=-1)


class FusedRuntime(Decoder):
    """`slicegpt.runtime.Runtime`: packed weights, fused operators, preallocated cache; one CUDA graph a token on a GPU.

    It is the runtime's own decoder, with a cache of the capacity that `Runtime.generate` would choose.
    """

    def __init__(self, runtime: Runtime, batch: int, length: int):
        self.runtime = runtime
        packed, device = runtime.network.packed, runtime.device
        self.weight_bytes = self.stored_bytes = runtime.bytes_per_token()
        for table in (packed.embedding, packed.positions):
            if table is not None and table.data_ptr() != packed.head.weight.data_ptr():
                self.stored_bytes += table.numel() * table.element_size()
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        self.cache = KVCache.allocate(packed.config, batch, capacity, packed.dtype, device)
        chosen = GraphDecoder if device.type == "cuda" else GrowingDecoder
        self.decoder = chosen(runtime.network, self.cache, Sampling(), (), 0, torch.Generator(device))

    @property
    def tokens(self) -> Tensor:
        return self.decoder.token[:, None]

    @torch.inference_mode()
    def prompt(self, ids: Tensor) -> None:
        self._start(self.runtime._last_logits(ids, None, self.cache), ids.shape[1])

    @torch.inference_mode()
    def fill(self, context: int) -> None:
        for states in (self.cache.keys, self.cache.values):
            states[:, :, :, :context].normal_()
        packed = self.runtime.network.packed
        self._start(torch.zeros(self.cache.batch, packed.config.vocab_size, device=packed.device), context)

    def _start(self, logits: Tensor, context: int) -> None:
        positions = torch.full((self.cache.batch,), context, device=self.runtime.device)
        self.decoder.start(logits, positions, context, padded=False)

    def step(self) -> None:
        self.decoder.step()


def bytes_read(model: nn.Module) -> int:
    """Bytes of the weights that every decoding step reads: all but the embedding tables, a tied head's among them.

    Of a table that is only looked up, a step reads one row a sequence, which is not counted.
    """
    head = model.get_output_embeddings()
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not head.weight
    }
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if id(parameter) not in looked_up
    )


def cache_bytes(network: Network, batch: int, context: float) -> float:
    """Bytes of the keys and values of `context` tokens in every layer."""
    config = network.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return batch * context * per_token * network.dtype.itemsize


@dataclass(frozen=True)
class Engine:
    """A way to decode.

    Attributes:
        name: as on the command line.
        title: for tables.
        start: (network, batch, most tokens of a sequence) -> its decoder.
        huggingface: runs Hugging Face's own class, which the dense model alone has.
        compiled: torch.compile, which takes a while and a compiler.
    """

    name: str
    title: str
    start: Callable[[Network, int, int], Decoder]
    huggingface: bool = False
    compiled: bool = False

    def reason_against(self, network: Network) -> str | None:
        """Why this engine does not take this network here, None where it does."""
        if self.huggingface and not network.is_dense:
            return "Hugging Face's own class is dense"
        if self.compiled and network.device.type == "cpu" and not shutil.which("g++"):
            return "torch.compile needs a C++ compiler on a CPU"
        return None


def huggingface(**settings) -> Callable[[Network, int, int], Decoder]:
    def start(network: Network, batch: int, length: int) -> Decoder:
        return CachedModel(network.huggingface(), batch, length, **settings)

    return start


def plain(**settings) -> Callable[[Network, int, int], Decoder]:
    def start(network: Network, batch: int, length: int) -> Decoder:
        return CachedModel(network.canonical(), batch, length, **settings)

    return start


def fused(network: Network, batch: int, length: int) -> Decoder:
    try:
        return FusedRuntime(network.runtime(), batch, length)
    except SliceGPTError as error:
        raise NotApplicable(first_line(error)) from error


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("hf", "Hugging Face", huggingface(), huggingface=True),
        Engine("hf-eager", "Hugging Face, eager attention", huggingface(attention="eager"), huggingface=True),
        Engine("hf-static", "Hugging Face, static cache", huggingface(cache="static"), huggingface=True),
        Engine(
            "hf-compile",
            "Hugging Face, static cache, torch.compile",
            huggingface(cache="static", compiled=True),
            huggingface=True,
            compiled=True,
        ),
        Engine("plain", "plain PyTorch", plain()),
        Engine(
            "plain-compile",
            "plain, static cache, torch.compile",
            plain(cache="static", compiled=True),
            compiled=True,
        ),
        Engine("fused", "slicegpt.runtime", fused),
    )
}


def chosen_engines(names: Sequence[str]) -> list[Engine]:
    """The engines of these names, in this order."""
    for name in names:
        if name not in ENGINES:
            raise SliceGPTError(f"--engines: must be among {', '.join(ENGINES)}, got {name!r}")
    return [ENGINES[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Case:
    """One network under one engine."""

    network: Network
    engine: Engine

    @property
    def name(self) -> str:
        return f"{self.network.label}, {self.engine.name}"


def pair(networks: Sequence[Network], engines: Sequence[Engine]) -> tuple[list[Case], list[dict]]:
    """All cases that can be, and a row `{network, engine, skipped}` with the reason for those that cannot."""
    cases, skipped = [], []
    for network in networks:
        network.keeps_plain = any(engine.name.startswith("plain") for engine in engines)
        network.keeps_huggingface = any(engine.huggingface for engine in engines)
        for engine in engines:
            reason = engine.reason_against(network)
            if reason is None:
                cases.append(Case(network, engine))
            elif not (engine.huggingface and not network.is_dense):  # that goes without saying
                skipped.append({"network": network.label, "engine": engine.name, "skipped": reason})
    if not cases:
        raise SliceGPTError(
            f"--engines: none of {', '.join(engine.name for engine in engines)} runs any of these networks here"
        )
    return cases, skipped


def start(case: Case, batch: int, length: int) -> Decoder:
    """The case's decoder; `NotApplicable` where the engine turns the network down."""
    try:
        return case.engine.start(case.network, batch, length)
    except NotImplementedError as error:
        raise NotApplicable(first_line(error)) from error


@contextmanager
def refusals(case: Case) -> Iterator[None]:
    """What torch.compile fails with, which has many types, becomes `NotApplicable`; so does too little memory."""
    try:
        yield
    except NotApplicable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise NotApplicable("out of memory") from None
        if case.engine.compiled:
            raise NotApplicable(f"{type(error).__name__}: {first_line(error)}") from error
        raise


def by_memory(cases: Sequence[Case], available: float) -> list[list[Case]]:
    """Groups of cases whose weights fit into memory together, in order; a network's own cases stay together.

    Cases of one group take turns, so fewer groups are better. Weights count once for each form that is run: Hugging
    Face's, the plain and the fused.
    """
    groups: list[list[Case]] = []
    used = 0.0
    for network in dict.fromkeys(id(case.network) for case in cases):
        own = [case for case in cases if id(case.network) == network]
        forms = {case.engine.name.split("-")[0] for case in own}
        needed = own[0].network.bytes * len(forms)
        if groups and used + needed <= available:
            groups[-1] += own
            used += needed
        else:
            groups.append(own)
            used = needed
    return groups
