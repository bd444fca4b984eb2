"""Generate with transformers and with the fused runtime: the same tokens, and tokens per second of both.

python examples/fast_runtime.py smollm2-135m --tokens 64
"""

import argparse
import time

import slicegpt
from slicegpt.runtime import Runtime

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "model", help="a dense or a sliced model: a folder, a hub id, a .gguf file or smollm2-135m"
)
parser.add_argument("--prompt", default="The for statement is used to")
parser.add_argument("--tokens", type=int, default=64)
options = parser.parse_args()

model, tokenizer = slicegpt.load(options.model)
prompt = tokenizer(options.prompt, return_tensors="pt").input_ids
count = options.tokens
runtime = Runtime(model)
generators = {
    "transformers": lambda: model.generate(
        prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False
    ),
    "runtime": lambda: runtime.generate(prompt, max_new_tokens=count, ignore_eos=True),
}
answers = {}
for name, generate in generators.items():
    generate()  # warms up
    start = time.perf_counter()
    answers[name] = generate()
    print(f"{name}: {count / (time.perf_counter() - start):.1f} tokens/s")
same = (answers["transformers"] == answers["runtime"]).all()
print(f"{'same' if same else 'other'} tokens:\n{tokenizer.decode(answers['runtime'][0])}")
