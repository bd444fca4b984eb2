"""`slicegpt generate --chat`: a conversation in the terminal, with the model's own chat template."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.calibration.files import check_unicode
from slicegpt.calibration.tokens import check_rows, learned_positions
from slicegpt.cli import interrupts
from slicegpt.cli.answering import Answer, Answering, Printer, say
from slicegpt.errors import SliceGPTError, first_line

DEFAULT_CONTEXT = 4096
HELP = "/clear forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass
class Conversation:
    """What was said, and what of it fits into the model's context.

    Attributes:
        context: tokens of history and answer together, at most.
        answer_tokens: of one answer, at most.
        rows: of the model's embedding table.
        system: a message that stands before all others and is never dropped.
        messages: as chat templates take them: {"role", "content"}.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    answer_tokens: int
    rows: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        check_template(self.tokenizer)
        self.clear()

    def clear(self) -> None:
        """Forget all but the system's message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> tuple[Tensor, int]:
        """Add a message of the user's.

        Returns:
            Token ids [1, tokens] of all messages, and how many of the oldest were dropped because they no longer fit.
        """
        check_unicode(text, "the message", "prompt")
        self.messages.append({"role": "user", "content": text})
        dropped = 0
        while True:
            ids = apply_template(self.tokenizer, self.messages)
            check_rows(ids, self.rows)
            if ids.shape[1] + self.answer_tokens <= self.context:
                return ids, dropped
            oldest = 0 if self.system is None else 1
            if len(self.messages) <= oldest + 1:
                raise SliceGPTError(
                    f"{self.context} tokens cannot hold a message of {ids.shape[1]} and an answer of up to "
                    f"{self.answer_tokens} (--max-new-tokens)",
                    "context",
                )
            del self.messages[oldest : oldest + 2]  # a question and its answer
            dropped += 2

    def take_back(self) -> None:
        """Forget the last message of the user's, which got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def answered(self, answer: Answer) -> None:
        """Add an answer; an empty one takes the question back."""
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        if text.strip():
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.take_back()


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise SliceGPTError(
            "the model's tokenizer has no chat template: give a --prompt without --chat", "chat"
        )


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Tensor:
    """Token ids [1, tokens] of messages and the beginning of an answer."""
    check_template(tokenizer)
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program, and refuses in its own words
        raise SliceGPTError(f"the chat template fails: {first_line(error)}", "chat") from error
    return encoded["input_ids"]


def open_conversation(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    context: int | None,
    answer_tokens: int,
    system: str | None,
) -> Conversation:
    """A conversation of at most `context` tokens; None: 4096, or what the model was trained for if that is less."""
    trained = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    context = min(DEFAULT_CONTEXT, trained) if context is None else context
    positions = learned_positions(model)
    if positions is not None and context > positions:
        raise SliceGPTError(
            f"must be at most the model's {positions} learned positions, got {context}", "context"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    return Conversation(tokenizer, context, answer_tokens, rows, system)


def read_message() -> str:
    """The next line; EOFError where there is none. No prompt where nobody types."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  cursor keys and earlier lines in `input`
        return input("> ")
    if sys.stdin.isatty():  # the answers go into a pipe or file
        print("> ", end="", file=sys.stderr, flush=True)
    return input()


def converse(engine: Answering, conversation: Conversation) -> None:
    """Answer line after line, until there are no more."""
    say(f"{engine.label}. {HELP}.")
    while True:
        try:
            text = read_message().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            interrupts.forget()
            say(f"\n{HELP}")
            continue
        if text == "/exit":
            return
        if text == "/clear":
            conversation.clear()
        elif text.startswith("/"):
            say(f"{text.split()[0]} is no command: {HELP}")
        elif text:
            reply(engine, conversation, text)


def reply(engine: Answering, conversation: Conversation, text: str) -> None:
    """Print the answer to one message, and a line about it on standard error."""
    try:
        ids, dropped = conversation.ask(text)
    except SliceGPTError as error:
        conversation.take_back()
        say(f"error: {error.reason}")
        return
    if dropped:
        say(f"note: the oldest {dropped} messages no longer fit and are forgotten")
    printer = Printer(conversation.tokenizer, ids)
    with interrupts.deferred() as stopped:
        engine.answer(ids, conversation.answer_tokens, printer, stopped)
    conversation.answered(printer.answer)
    say(printer.answer.summary(engine.name))
