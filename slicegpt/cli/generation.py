"""`slicegpt generate`: continue a prompt, or chat, printed as it is generated.

The text goes to standard output; what is said about it, such as tokens/s, to standard error.
"""

import argparse

from slicegpt.checkpoint.names import check_name
from slicegpt.errors import SliceGPTError
from slicegpt.table import check_writable

from .options import add_device, add_json, add_shared, check_device, positive

# Where --max-new-tokens does not say.
NEW_TOKENS, ANSWER_TOKENS = 64, 512


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt, or chat",
        description="Continue a prompt with a model, or answer messages in a chat. Standard output holds the text "
        "alone; tokens/s and the engine are told on standard error.",
        examples=(
            'slicegpt generate small --prompt "The for statement is"',
            "slicegpt generate small --chat --sample --temperature 0.7",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR|MODEL")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; with --chat a single message, which may be left out (default: none)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="a conversation in the model's chat template, a message a line; Ctrl-C stops an answer, Ctrl-D ends",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a message before all others")
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of a chat; beyond, the oldest messages are forgotten (default: 4096, or the model's where it has "
        "fewer)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"tokens to generate at most (default: {NEW_TOKENS}, of an answer in a chat {ANSWER_TOKENS})",
    )
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="logits are divided by it, with --sample"
    )
    parser.add_argument(
        "--top-k", type=positive, default=50, metavar="N", help="only the N likeliest tokens, with --sample"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens of this much probability together, with --sample",
    )
    add_shared(parser, "--seed")
    parser.add_argument(
        "--runtime",
        choices=("auto", "fused", "plain"),
        default="auto",
        help="fused: this package's, packed weights, fused operators and a static cache; plain: transformers' "
        "generate; auto (default): fused, or plain for a model that fused cannot run",
    )
    parser.add_argument(
        "--weights",
        choices=("int8", "int4"),
        help="round the weights to nearest as they are loaded, by row or in groups of 32 columns: fewer bytes to read, "
        "and another, worse model (default: as they are stored)",
    )
    add_device(parser)
    add_json(parser)


def check_options(options: argparse.Namespace) -> None:
    """What can be told without the model."""
    if options.prompt is None and not options.chat:
        raise SliceGPTError("is needed, unless --chat is given", "prompt")
    # Logits divided by less are beyond float32.
    if options.sample and not options.temperature >= 1e-6:
        raise SliceGPTError(f"must be at least 1e-6, got {options.temperature}", "temperature")
    if options.sample and not 0 < options.top_p <= 1:
        raise SliceGPTError(f"must lie in (0, 1], got {options.top_p}", "top_p")
    if options.weights and options.runtime == "plain":
        raise SliceGPTError("needs the runtime, and --runtime is plain", "weights")
    check_device(options.device)
    check_writable("--json", options.json)
    check_name(options.model, "model")


def run(options: argparse.Namespace) -> None:
    # What can be checked without the model is checked before anything heavy is imported.
    check_options(options)
    (run_chat if options.prompt is None else run_prompt)(options)


def load_model(options: argparse.Namespace):
    """The model, its tokenizer, and how tokens are chosen."""
    from slicegpt.api import load
    from slicegpt.runtime import Sampling

    model, tokenizer = load(options.model, options.dtype, options.device)
    sampling = Sampling()
    if options.sample:
        sampling = Sampling(True, options.temperature, options.top_k, options.top_p)
    return model, tokenizer, sampling


def encode(tokenizer, prompt: str, options: argparse.Namespace):
    """Token ids [1, tokens] of the prompt; an error where there is nothing to continue or no chat template."""
    from slicegpt.calibration.files import check_unicode

    check_unicode(prompt, "the prompt", "prompt")
    if options.chat:
        from slicegpt.cli.chat import apply_template

        return apply_template(tokenizer, [*first_messages(options), {"role": "user", "content": prompt}])
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.shape[1]:
        raise SliceGPTError("must hold at least one token, got an empty one", "prompt")
    return ids


def first_messages(options: argparse.Namespace) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def run_prompt(options: argparse.Namespace) -> None:
    """Continue one prompt."""
    from slicegpt.calibration import check_fits
    from slicegpt.cli.answering import Printer, open_engine, say
    from slicegpt.table import write_json

    model, tokenizer, sampling = load_model(options)
    ids = encode(tokenizer, options.prompt, options)
    count = options.max_new_tokens or NEW_TOKENS
    length = ids.shape[1] + count
    check_fits(model, ids, length)
    with open_engine(
        options.runtime, model, tokenizer, sampling, options.seed, length, options.weights
    ) as engine:
        del model  # the runtime has a copy of a dense model's weights
        if not options.chat:
            print(options.prompt, end="", flush=True)
        printer = Printer(tokenizer, ids, continues=not options.chat)
        engine.answer(ids, count, printer, lambda: False)
    answer = printer.answer
    say(answer.summary(engine.label))
    if options.json:
        write_json(
            options.json,
            {
                "prompt": options.prompt,
                "text": tokenizer.decode(answer.tokens, skip_special_tokens=True),
                "tokens": len(answer.tokens),
                "seconds": round(answer.times[-1], 3),
                "prompt_tokens": answer.prompt,
                "prompt_seconds": round(answer.times[0], 3),
                "tokens_per_second": answer.tokens_per_second,
                "runtime": engine.name,
                "engine": engine.label,
            },
        )


def run_chat(options: argparse.Namespace) -> None:
    """Answer messages from standard input until there are no more."""
    from slicegpt.cli.answering import open_engine
    from slicegpt.cli.chat import converse, open_conversation
    from slicegpt.table import write_json

    model, tokenizer, sampling = load_model(options)
    count = options.max_new_tokens or ANSWER_TOKENS
    conversation = open_conversation(tokenizer, model, options.context, count, options.system)
    with open_engine(
        options.runtime, model, tokenizer, sampling, options.seed, conversation.context, options.weights
    ) as engine:
        del model
        converse(engine, conversation)
    if options.json:
        write_json(options.json, {"messages": conversation.messages, "runtime": engine.name})
