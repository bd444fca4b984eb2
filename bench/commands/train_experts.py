"""Train a small mixture of experts on a text, for want of a published one that fits: a Qwen3-MoE of 0.5M parameters.

    python -m slicegpt.bench.commands.train_experts --text train.txt --output tiny-moe --steps 1000

Its router has learnt something, which that of a random model has not: experts differ, and so do the tokens they get.
Byte-level BPE of 512 tokens from the same text, AdamW, windows drawn at random, the load-balancing loss of
transformers. The same seed on the same machine gives the same model.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from slicegpt.progress import Progress
from slicegpt.table import check_writable, write_json

VOCABULARY, WINDOW, BATCH, RATE = 512, 64, 16, 5e-3


def tokenizer_of(text: str):
    """A byte-level BPE trained on `text`; a text begins with `<bos>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def new_model(seed: int):
    """The model before training: 3 layers of 8 experts, 2 for a token, 96 neurons each; a tied head."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=192,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def train(model, ids, steps: int, seed: int, progress: Progress) -> list[float]:
    """Train in place on `ids` [tokens]; returns the loss of every step, in nats a token with the balancing loss."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    model.train()
    with progress.stage("training", steps, "steps") as advance:
        for step in range(steps):
            rate = min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = RATE * max(rate, 0.02)
            starts = torch.randint(len(ids) - WINDOW, (BATCH, 1), generator=generator)
            batch = ids[starts + torch.arange(WINDOW)]
            loss = model(batch, labels=batch, output_router_logits=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            advance(1)
    model.eval()
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="the loss of every step")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    import torch

    text = Path(options.text).read_text(encoding="utf-8")
    tokenizer = tokenizer_of(text)
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    model = new_model(options.seed)
    losses = train(model, ids, options.steps, options.seed, Progress())
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(os.fspath(options.output))
    last = sum(losses[-20:]) / len(losses[-20:])
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens of text, loss {last:.3f} at the end")
    if options.json:
        write_json(
            options.json, {"losses": losses, "parameters": model.num_parameters(), "seed": options.seed}
        )


if __name__ == "__main__":
    main()
