"""Speculative decoding: the dense model's tokens, drafted by slices of it.

    python -m slicegpt.bench.commands.speculative smollm2-135m draft-a draft-b --json results.json

Greedy, one sequence at a time, transformers' own `generate` for all. Prompts are beginnings of documents that slicing
did not see. Each prompt is continued by the dense model alone and with every draft, in turns; the tokens must be the
dense model's own. A round's draft proposes `--proposals` tokens; of `n` tokens that took `p` passes of the dense model,
`n - p` were proposals that it accepted.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.bench.harness.display import print_rows
from slicegpt.bench.harness.record import check_writable, write_results
from slicegpt.calibration.documents import load_documents
from slicegpt.checkpoint.loading import load_dense


@dataclass
class Count:
    """Forward passes of a model, counted by a hook."""

    passes: int = 0

    def __call__(self, *_) -> None:
        self.passes += 1


def read_prompts(
    tokenizer: PreTrainedTokenizerBase, data: str, count: int, length: int
) -> list[torch.Tensor]:
    """Ids [1, `length`] of the beginnings of the first `count` test documents that are long enough."""
    prompts = []
    for document in load_documents(data, split="test"):
        ids = tokenizer(document[: 16 * length], return_tensors="pt").input_ids[:, :length]
        if ids.shape[1] == length and len(prompts) < count:
            prompts.append(ids)
    return prompts


def prepare_draft(draft: PreTrainedModel, proposals: int) -> None:
    """The same number of proposals in every round, whatever the draft thinks of them."""
    draft.generation_config.num_assistant_tokens = proposals
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0


@torch.inference_mode()
def measure(
    dense: PreTrainedModel, drafts: dict[str, PreTrainedModel], prompts: list[torch.Tensor], tokens: int
) -> dict[str, dict]:
    """Sums over the prompts: seconds, passes of the dense model, proposals, prompts whose tokens are not its own."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    sums: dict[str, dict] = defaultdict(
        lambda: dict.fromkeys(("seconds", "passes", "proposals", "differing"), 0)
    )
    for ids in prompts:
        alone = None
        for name, draft in ({"alone": None} | drafts).items():
            own, drafted = Count(), Count()
            hooks = [dense.register_forward_hook(own)]
            hooks += [draft.register_forward_hook(drafted)] if draft is not None else []
            start = time.perf_counter()
            output = dense.generate(ids, assistant_model=draft, **settings)
            seconds = time.perf_counter() - start
            for hook in hooks:
                hook.remove()
            alone = output if alone is None else alone
            each = {"seconds": seconds, "passes": own.passes, "proposals": drafted.passes}
            each["differing"] = int(not torch.equal(output, alone))
            sums[name] = {key: sums[name][key] + value for key, value in each.items()}
    return dict(sums)


def describe(sums: dict[str, dict], tokens: int) -> list[dict]:
    """A row for the dense model alone and for each draft; the ratio is of tokens per second."""
    rows = []
    for name, each in sums.items():
        accepted = (tokens - each["passes"]) / each["proposals"] if each["proposals"] else None
        rows.append(
            {
                "draft": name,
                "accepted": "" if accepted is None else f"{accepted:.1%}",
                "tokens a pass": round(tokens / each["passes"], 2),
                "tokens/s": round(tokens / each["seconds"], 2),
                "ratio": round(sums["alone"]["seconds"] / each["seconds"], 3),
                "differing": each["differing"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense")
    parser.add_argument("drafts", nargs="+", help="folders of sliced models")
    parser.add_argument("--proposals", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="new ones a prompt")
    parser.add_argument("--data", default="python-reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    check_writable("--json", options.json)
    torch.set_num_threads(options.threads)
    dense, tokenizer = load_dense(options.dense, dtype=torch.float32)
    drafts = {
        name: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in options.drafts
    }
    for draft in drafts.values():
        prepare_draft(draft, options.proposals)
    prompts = read_prompts(tokenizer, options.data, options.prompts, options.prompt_tokens)
    measure(dense, drafts, prompts[:1], 8)  # warms up
    rows = describe(measure(dense, drafts, prompts, options.tokens), len(prompts) * options.tokens)
    print_rows("speculative", rows)
    write_results(options.json, "speculative", {"options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
