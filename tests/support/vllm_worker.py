"""Run by test_vllm.py in a process of its own: greedy tokens of several folders on vLLM.

    python vllm_worker.py JOB.json RESULT.json

The job holds `models` (folders), `prompts` (lists of token ids), `max_tokens` and `engine` (options of `LLM`).
"""

import gc
import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    results = {}
    for folder in job["models"]:
        engine = LLM(model=folder, skip_tokenizer_init=True, disable_log_stats=True, **job["engine"])
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        results[folder] = [output.outputs[0].token_ids for output in outputs]
        del engine
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":  # vLLM's own processes import this file
    main()
