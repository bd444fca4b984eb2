"""`slicegpt generate`: continue a prompt, printed as it is generated."""

import argparse
import time

from slicegpt.checkpoint.names import check_name
from slicegpt.errors import SliceGPTError
from slicegpt.table import check_writable

from .options import add_device, add_json, add_shared, check_device, positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with a model.",
        examples=(
            'slicegpt generate small --prompt "The for statement is" --runtime fused',
            'slicegpt generate small --prompt "Write a haiku." --chat --sample --temperature 0.7',
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="DIR|MODEL")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens to generate at most"
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
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
        choices=("plain", "fused"),
        default="plain",
        help="plain: transformers' generate; fused: packed weights, fused operators and a static cache",
    )
    add_device(parser)
    add_json(parser)


def encode(tokenizer, prompt: str, chat: bool):
    """Token ids and mask of the prompt; an error where there is nothing to continue or no chat template."""
    from slicegpt.calibration.files import check_unicode

    check_unicode(prompt, "the prompt", "prompt")
    if chat:
        if not tokenizer.chat_template:
            raise SliceGPTError("the model's tokenizer has no chat template", "chat")
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise SliceGPTError("must hold at least one token, got an empty one", "prompt")
    return inputs


def run(options: argparse.Namespace) -> None:
    # What can be checked without the model is checked before anything heavy is imported.
    # Logits divided by less are beyond float32.
    if options.sample and not options.temperature >= 1e-6:
        raise SliceGPTError(f"must be at least 1e-6, got {options.temperature}", "temperature")
    if options.sample and not 0 < options.top_p <= 1:
        raise SliceGPTError(f"must lie in (0, 1], got {options.top_p}", "top_p")
    check_device(options.device)
    check_writable("--json", options.json)
    check_name(options.model, "model")

    from transformers import TextStreamer

    from slicegpt.api import load
    from slicegpt.calibration import check_fits
    from slicegpt.table import write_json

    model, tokenizer = load(options.model, options.dtype, options.device)
    inputs = encode(tokenizer, options.prompt, options.chat).to(model.device)
    check_fits(model, inputs["input_ids"], inputs["input_ids"].shape[1] + options.max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate = _fused if options.runtime == "fused" else _plain
    new_tokens, seconds = generate(options, model, tokenizer, inputs, streamer)
    if options.json:
        write_json(
            options.json,
            {
                "prompt": options.prompt,
                "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
                "tokens": len(new_tokens),
                "seconds": round(seconds, 3),
                "runtime": options.runtime,
            },
        )


def _plain(options: argparse.Namespace, model, tokenizer, inputs, streamer) -> tuple[list[int], float]:
    """The new tokens and the seconds they took."""
    import torch

    sampling = {"do_sample": False}
    if options.sample:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=options.max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    return output[0, inputs["input_ids"].shape[1] :].tolist(), seconds


def _fused(options: argparse.Namespace, model, tokenizer, inputs, streamer) -> tuple[list[int], float]:
    """The new tokens and the seconds they took; packing the weights is not counted."""
    from slicegpt.runtime import Runtime, Sampling

    sampling = Sampling()
    if options.sample:
        sampling = Sampling(True, options.temperature, options.top_k, options.top_p)
    length = inputs["input_ids"].shape[1] + options.max_new_tokens
    runtime = Runtime(model, max_length=length, release=True)
    start = time.perf_counter()
    output = runtime.generate(
        inputs["input_ids"],
        inputs["attention_mask"],
        options.max_new_tokens,
        sampling,
        options.seed,
        streamer=streamer,
    )
    seconds = time.perf_counter() - start
    return output[0, inputs["input_ids"].shape[1] :].tolist(), seconds
