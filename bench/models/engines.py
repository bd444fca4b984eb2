"""Engines: the implementations of decoding, by name, and the pairs of network and engine that a benchmark measures."""

import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from slicegpt.bench.harness.memory import is_out_of_memory
from slicegpt.bench.harness.record import without_folders
from slicegpt.bench.models import llama_cpp
from slicegpt.bench.models.decoders import ForwardDecoder, GenerateDecoder, GreedyDecoder, RuntimeDecoder
from slicegpt.bench.models.networks import MeasuredNetwork
from slicegpt.errors import SliceGPTError, first_line


class NotApplicable(Exception):
    """An engine cannot run a network on this machine; the message is the reason, for the table."""


class OutOfMemory(NotApplicable):
    """A network needs more memory than there is."""


def cache_bytes(network: MeasuredNetwork, batch: int, context: float) -> float:
    """Bytes of the keys and values of `context` tokens for each of `batch` sequences, all layers."""
    config = network.config
    per_token = 2 * sum(config.key_value_heads) * config.head_dim
    return batch * context * per_token * network.dtype.itemsize


@dataclass(frozen=True)
class Engine:
    """An implementation of decoding.

    Attributes:
        name: as on the command line and in tables.
        start: (network, batch, maximum length in tokens) -> decoder.
        huggingface: runs Hugging Face's own class, which exists for the dense model only.
        compiled_on: device types where it uses torch.compile, which takes time and, on a CPU, a compiler.
        own_weights: its weights are not the network's: rows give the bytes of its own.
        shape: layers, columns and vocabulary of the dense model whose weights it has; None: any network's.
    """

    name: str
    start: Callable[[MeasuredNetwork, int, int], GreedyDecoder]
    huggingface: bool = False
    compiled_on: tuple[str, ...] = ()
    own_weights: bool = False
    shape: tuple[int, int, int] | None = None

    def compiles(self, network: MeasuredNetwork) -> bool:
        return network.device.type in self.compiled_on

    def reason_against(self, network: MeasuredNetwork) -> str | None:
        """Why this engine cannot run this network on this machine; None where it can."""
        if self.huggingface and not network.is_dense:
            return "Hugging Face's own class is dense"
        if self.compiles(network) and network.device.type == "cpu" and not shutil.which("g++"):
            return "torch.compile needs a C++ compiler on a CPU"
        if self.shape is not None and network.device.type != "cpu":
            return "it is measured on a CPU"
        return None


def huggingface(
    decoder: type[ForwardDecoder] = ForwardDecoder, **settings
) -> Callable[[MeasuredNetwork, int, int], GreedyDecoder]:
    def start(network: MeasuredNetwork, batch: int, length: int) -> GreedyDecoder:
        return decoder(network.huggingface(), batch, length, **settings)

    return start


def plain(**settings) -> Callable[[MeasuredNetwork, int, int], GreedyDecoder]:
    def start(network: MeasuredNetwork, batch: int, length: int) -> GreedyDecoder:
        return ForwardDecoder(network.canonical(), batch, length, **settings)

    return start


def fused(weights: str | None = None) -> Callable[[MeasuredNetwork, int, int], GreedyDecoder]:
    def start(network: MeasuredNetwork, batch: int, length: int) -> GreedyDecoder:
        try:
            return RuntimeDecoder(network.runtime(weights), batch, length)
        except SliceGPTError as error:
            raise NotApplicable(first_line(error)) from error

    return start


def without_file(network: MeasuredNetwork, batch: int, length: int) -> GreedyDecoder:
    raise NotApplicable("llama-cpp needs a file: --gguf")


ANYWHERE = ("cpu", "cuda")

# "hf": the forward pass of Hugging Face's class in a loop of this package; "hf-generate": its `generate()`, which on a
# GPU compiles the forward pass where the cache is static. "plain": this package's model, as `from_pretrained` loads it.
# "fused-int8", "fused-int4": the runtime with the weights rounded to nearest. "llama-cpp": a GGUF file in llama.cpp.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("hf", huggingface(), huggingface=True),
        Engine("hf-eager", huggingface(attention="eager"), huggingface=True),
        Engine("hf-static", huggingface(cache="static"), huggingface=True),
        Engine(
            "hf-compile", huggingface(cache="static", compiled=True), huggingface=True, compiled_on=ANYWHERE
        ),
        Engine("hf-generate", huggingface(GenerateDecoder), huggingface=True),
        Engine(
            "hf-generate-static",
            huggingface(GenerateDecoder, cache="static"),
            huggingface=True,
            compiled_on=("cuda",),
        ),
        Engine("plain", plain()),
        Engine("plain-compile", plain(cache="static", compiled=True), compiled_on=ANYWHERE),
        Engine("fused", fused()),
        Engine("fused-int8", fused("int8"), own_weights=True),
        Engine("fused-int4", fused("int4"), own_weights=True),
        Engine("llama-cpp", without_file, own_weights=True),
    )
}


def chosen_engines(names: Sequence[str], gguf: Sequence[str] = ()) -> list[Engine]:
    """The engines of these names, in this order; "llama-cpp" is one for each of the files `gguf`."""
    for name in names:
        if name not in ENGINES:
            raise SliceGPTError(f"--engines: must be among {', '.join(ENGINES)}, got {name!r}")
    if gguf and "llama-cpp" not in names:
        raise SliceGPTError("--gguf: is for the engine llama-cpp, which --engines does not name")
    chosen: list[Engine] = []
    for name in dict.fromkeys(names):
        chosen += llama_cpp_engines(gguf) if name == "llama-cpp" else [ENGINES[name]]
    return chosen


def llama_cpp_engines(files: Sequence[str]) -> list[Engine]:
    """An engine for each GGUF file, called after the type of its weights: "llama-cpp q8_0"."""
    if not files:
        raise SliceGPTError("--engines: llama-cpp needs a GGUF file, --gguf")
    if not llama_cpp.is_available():
        raise SliceGPTError("--engines: llama-cpp needs the package llama-cpp-python, which is not installed")
    found = []
    for file in dict.fromkeys(files):
        facts = llama_cpp.GGUFFacts(file)
        start = llama_cpp.starter(file, facts)
        found.append(Engine(f"llama-cpp {facts.kind}", start, own_weights=True, shape=facts.shape))
    return found


@dataclass(frozen=True)
class BenchmarkCase:
    """One network with one engine."""

    network: MeasuredNetwork
    engine: Engine

    @property
    def name(self) -> str:
        return f"{self.network.label}, {self.engine.name}"


def benchmark_cases(
    networks: Sequence[MeasuredNetwork], engines: Sequence[Engine]
) -> tuple[list[BenchmarkCase], list[dict]]:
    """Every pair that can run, and a row `{network, engine, skipped}` with the reason for every pair that cannot."""
    cases, skipped = [], []
    for network in networks:
        network.keeps_plain = any(engine.name.startswith("plain") for engine in engines)
        network.forms = sum(engine.name.startswith("fused") for engine in engines)
        network.keeps_huggingface = any(engine.huggingface for engine in engines)
        for engine in engines:
            if engine.shape is not None and not (network.is_dense and engine.shape == shape_of(network)):
                continue  # another model's file
            reason = engine.reason_against(network)
            if reason is None:
                cases.append(BenchmarkCase(network, engine))
            elif not (engine.huggingface and not network.is_dense):  # not worth a row
                skipped.append(not_measured(BenchmarkCase(network, engine), reason))
    if not cases:
        raise SliceGPTError(
            f"--engines: none of {', '.join(engine.name for engine in engines)} runs any of these networks here"
        )
    return cases, skipped


def shape_of(network: MeasuredNetwork) -> tuple[int, int, int]:
    """Layers, columns and vocabulary of the dense model."""
    config = network.config
    return config.num_hidden_layers, config.dense_hidden_size, config.vocab_size


def start_decoder(case: BenchmarkCase, batch: int, length: int) -> GreedyDecoder:
    """The case's decoder; raises `NotApplicable` where the engine does not support the network."""
    try:
        return case.engine.start(case.network, batch, length)
    except NotImplementedError as error:
        raise NotApplicable(first_line(error)) from error


@contextmanager
def errors_as_not_applicable() -> Iterator[None]:
    """Convert any exception to `NotApplicable`, so that the other cases continue.

    `SliceGPTError`, which concerns the user's input, passes.
    """
    try:
        yield
    except (NotApplicable, SliceGPTError):
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        if is_out_of_memory(error):
            raise OutOfMemory("out of memory") from None
        raise NotApplicable(without_folders(f"{type(error).__name__}: {first_line(error)}")) from error


def not_measured(case: BenchmarkCase, reason: object, partial: bool = False) -> dict:
    """A row of "skipped" in a record.

    Args:
        partial: the case also has a row of figures, measured before it failed.
    """
    row = {"network": case.network.label, "engine": case.engine.name, "skipped": str(reason)}
    return row | {"partial": True} if partial else row


def groups_by_memory(cases: Sequence[BenchmarkCase], available: float) -> list[list[BenchmarkCase]]:
    """Groups of cases whose weights fit into `available` bytes together, in order; a network's cases stay together.

    Cases of one group take turns, so fewer groups are better. Weights count once for each form that is run: Hugging
    Face's, the plain and the fused one.
    """
    groups: list[list[BenchmarkCase]] = []
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
