"""What `slicegpt generate` answers with: the runtime or transformers' `generate()`, printed as it comes and timed."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.memory import free_memory
from slicegpt.modeling import SlicedForCausalLM
from slicegpt.modeling.sizes import format_bytes
from slicegpt.runtime import Runtime, Sampling
from slicegpt.runtime.session import Session
from slicegpt.table import fit_text, output_width


@dataclass
class Answer:
    """New tokens and when they came, in seconds since the prompt was given."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, whose time is the prompt's; None for fewer than two."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-9)

    def summary(self, engine: str) -> str:
        """One line for people."""
        rate = self.tokens_per_second
        first = self.times[0] if self.times else 0.0
        parts = [f"{len(self.tokens)} tokens", *([] if rate is None else [f"{rate:.1f} tokens/s"])]
        return f"{', '.join(parts)}; prompt: {self.prompt} tokens in {first:.2f} s ({engine})"


def say(text: str) -> None:
    """A note on standard error, beside the answers: broken between words where that is a terminal."""
    print(fit_text(text, output_width(sys.stderr)), file=sys.stderr)


class Printer(TextStreamer):
    """Prints an answer word by word on standard output and notes when its tokens came.

    Args:
        continues: the answer follows the prompt on its line. Tokenizers such as Llama's drop the space before the first
            word of what they decode, so the prompt's last token is decoded with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, continues: bool = False):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.answer = Answer(prompt.shape[1])
        self.next_tokens_are_prompt = True
        self._began = time.perf_counter()
        if continues:
            self.token_cache = prompt[0, -1:].tolist()
            self.print_len = len(tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt:  # transformers' generate() gives the prompt first
            self.next_tokens_are_prompt = False
            return
        self.add(int(value))

    def add(self, token: int) -> None:
        """A new token."""
        self.answer.times.append(time.perf_counter() - self._began)
        self.answer.tokens.append(token)
        self.next_tokens_are_prompt = False
        super().put(torch.tensor([token]))


class Answering(Protocol):
    """An engine that continues one prompt after another.

    Attributes:
        name: "fused" or "plain", as `--runtime` calls it.
        label: what people are told.
    """

    name: str
    label: str

    def answer(self, ids: Tensor, count: int, printer: Printer, stopped: Callable[[], bool]) -> None:
        """Give `printer` at most `count` new tokens, and no more once `stopped()`."""


class FusedAnswering:
    """`slicegpt.runtime`; a prompt that begins as the last one did is computed from there on."""

    name = "fused"

    def __init__(self, runtime: Runtime, session: Session, seed: int):
        self.session, self.seed = session, seed
        weights = runtime.executor.packed.weights_text()
        self.label = f"runtime, {runtime.decoder_name(1)} decoder, {weights} on {runtime.device}"

    def answer(self, ids: Tensor, count: int, printer: Printer, stopped: Callable[[], bool]) -> None:
        with closing(self.session.stream(ids, count, self.seed)) as tokens:
            self.seed = None  # later answers go on with its sequence
            for token in tokens:
                printer.add(token)
                if stopped():
                    break
        printer.end()


class PlainAnswering:
    """transformers' `generate()`."""

    name = "plain"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int
    ):
        self.model = model
        dtype = str(model.dtype).removeprefix("torch.")
        self.label = f"transformers' generate(), {dtype} on {model.device}"
        self.settings = {"do_sample": False}
        if sampling.do_sample:
            self.settings = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.settings["pad_token_id"] = pad
        torch.manual_seed(seed)

    def answer(self, ids: Tensor, count: int, printer: Printer, stopped: Callable[[], bool]) -> None:
        def stop(ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full((len(ids),), stopped(), device=ids.device)

        ids = ids.to(self.model.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            streamer=printer,
            stopping_criteria=[stop],
            **self.settings,
        )


def check_room(model: PreTrainedModel) -> None:
    """An error where a dense model's weights, which the runtime folds into a copy, do not fit a second time."""
    if not isinstance(model, SlicedForCausalLM):
        needed, free = sum(weight.nbytes for weight in model.parameters()), free_memory(model.device)
        if needed > free:
            raise SliceGPTError(
                f"its folded copy takes {format_bytes(needed)}, and {format_bytes(free)} are free"
            )


@contextmanager
def open_engine(
    runtime: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    seed: int,
    length: int,
    weights: str | None = None,
) -> Iterator[Answering]:
    """The engine that `--runtime` names; "auto" is the runtime, for a model that it cannot run transformers.

    Args:
        model: its weights are freed as the runtime packs them.
        length: tokens of a prompt and its answer together, at most.
        weights: what the runtime rounds the weights to, see `Runtime`; never with transformers.
    """
    packed = None
    if runtime != "plain":
        try:
            if runtime == "auto":
                check_room(model)
            packed = Runtime(model, max_length=length, release=True, weights=weights)
        except SliceGPTError as error:
            if runtime == "fused" or weights is not None:
                raise
            say(f"note: the runtime cannot run this model: {error.reason}")
    lent: AbstractContextManager = nullcontext() if packed is None else packed.session(length, sampling)
    with lent as session:
        if packed is None:
            yield PlainAnswering(model, tokenizer, sampling, seed)
        else:
            del model  # the runtime has a copy of a dense model's weights
            yield FusedAnswering(packed, session, seed)
