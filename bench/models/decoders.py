"""Greedy decoding with one interface for every implementation.

The dense model also runs in Hugging Face's own class, so that a sliced model is compared with the best that users have
today, and not with this package's version of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from slicegpt.hardware.devices import kernels_for_new_shapes
from slicegpt.modeling import CACHE
from slicegpt.runtime import Runtime, Sampling


class GreedyDecoder(ABC):
    """Greedy decoding of one batch. The tokens stay on the device.

    Attributes:
        weight_bytes: of the weights that every step reads.
        stored_bytes: of all weights that this engine keeps.
        tokens: [batch, 1], the last tokens chosen.
    """

    weight_bytes: int
    stored_bytes: int
    tokens: Tensor

    @abstractmethod
    def prompt(self, ids: Tensor) -> None:
        """Process a prompt [batch, tokens] and choose the next token."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Instead of a prompt: fill the cache with random keys and values of `context` tokens."""

    @abstractmethod
    def step(self) -> None:
        """Decode one token for every sequence."""

    def steps(
        self, count: int, after: Callable[[], object], before: Callable[[], object] | None = None
    ) -> None:
        """One step, then `count` more with `before()` and `after()` around each.

        The first step has no callbacks: it absorbs cold caches, after other decoders ran, and the cost of the call.
        """
        self.resume()
        self.step()
        for _ in range(count):
            if before is not None:
                before()
            self.step()
            after()

    def resume(self) -> None:  # noqa: B027 (most engines need nothing)
        """Called before a series of steps: engines that share a model take turns, and may have changed its state."""


class ForwardDecoder(GreedyDecoder):
    """Forward passes of a model with a key-value cache: dynamic, as in `generate()`, or static.

    On a GPU, prompts and growing caches do not use cuDNN's attention: it builds a plan for every new length, and the
    model that runs first would pay for all (see `slicegpt.hardware.devices`). Steps with a static cache have one shape
    and use PyTorch's default.
    """

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
        self.growing = cache != "static"
        self.forward = model
        if compiled:
            # Every network and batch is compiled separately, on purpose; the default limit guards against accidents.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self.forward = torch.compile(model.forward, mode=mode, dynamic=False, fullgraph=True)
        self.tokens = torch.full((batch, 1), 5, device=model.device)
        self.resume()

    def resume(self) -> None:
        self.model.set_attn_implementation(self.attention)

    def kernels(self) -> AbstractContextManager:
        """Context that selects the attention kernels while decoding."""
        return kernels_for_new_shapes(self.model.device) if self.growing else nullcontext()

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> None:
        # Not compiled: prompt lengths seldom repeat.
        with kernels_for_new_shapes(self.model.device):
            self._choose(self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}))

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
        with self.kernels():
            self._choose(self.forward(self.tokens, use_cache=True, **{CACHE: self.cache}))

    def _choose(self, output) -> None:
        self.tokens = output.logits[:, -1:].argmax(dim=-1)


class CallbackStreamer(BaseStreamer):
    """A streamer for `generate()` that calls a function with every new token [batch]; the prompt is skipped."""

    def __init__(self, callback: Callable[[Tensor], object]):
        self.callback = callback

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:  # the prompt is [batch, tokens]
            self.callback(value)

    def end(self) -> None:
        pass


class GenerateDecoder(ForwardDecoder):
    """Hugging Face's `generate()`, which is what users call: includes the time of the Python around the model.

    Every series of steps is one call, which continues with the cache of the previous one. Always greedy, without
    penalties or an end token, whatever the checkpoint's generation config says.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int, **settings):
        super().__init__(model, batch, length, **settings)
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def prompt(self, ids: Tensor) -> None:
        self.ids = ids
        self._generate(1, self._keep)

    def fill(self, context: int) -> None:
        super().fill(context)
        self.ids = torch.full((self.batch, context + 1), 5, device=self.model.device)

    def step(self) -> None:
        self._generate(1, self._keep)

    def steps(
        self, count: int, after: Callable[[], object], before: Callable[[], object] | None = None
    ) -> None:
        self.resume()
        taken = 0

        def seen(value: Tensor) -> None:
            nonlocal taken
            self._keep(value)
            if taken > 0:
                after()
            if taken < count and before is not None:
                before()
            taken += 1

        self._generate(count + 1, seen)

    def _keep(self, value: Tensor) -> None:
        self.tokens = value[:, None]

    def _generate(self, count: int, seen: Callable[[Tensor], object]) -> None:
        with self.kernels():
            self.ids = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                max_new_tokens=count,
                streamer=CallbackStreamer(seen),
                **{CACHE: self.cache},
            )


class RuntimeDecoder(GreedyDecoder):
    """`slicegpt.runtime.Runtime`: packed weights, fused operators, preallocated cache.

    A token is one CUDA graph on a GPU, one call on a CPU; decoder and cache are those that `Runtime.generate` uses.
    """

    def __init__(self, runtime: Runtime, batch: int, length: int):
        self.runtime = runtime
        self.weight_bytes = runtime.bytes_per_token(batch)
        self.stored_bytes = runtime.executor.packed.stored_bytes()
        self.cache = runtime.new_cache(batch, length)
        self.decoder = runtime.new_decoder(self.cache, Sampling())

    @property
    def tokens(self) -> Tensor:
        return self.decoder.token[:, None]

    @torch.inference_mode()
    def prompt(self, ids: Tensor) -> None:
        self._start(self.runtime._last_logits(ids, None, self.cache), ids.shape[1])

    @torch.inference_mode()
    def fill(self, context: int) -> None:
        for states in (self.cache.keys, self.cache.values):
            states[:, :, :context].normal_()
        packed = self.runtime.executor.packed
        self._start(torch.zeros(self.cache.batch, packed.config.vocab_size, device=packed.device), context)

    def _start(self, logits: Tensor, context: int) -> None:
        positions = torch.full((self.cache.batch,), context, device=self.runtime.device)
        self.decoder.start(logits, positions, context, padded=False)

    def step(self) -> None:
        self.decoder.step()


def bytes_read(model: nn.Module) -> int:
    """Bytes of the weights that every decoding step reads: all but embedding tables, unless one is the tied head.

    The one row of a table that a step looks up for each sequence is not counted.
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
