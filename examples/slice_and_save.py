"""Slice a model, save it as a Hugging Face folder, and load that with transformers alone.

python examples/slice_and_save.py smollm2-135m --keep 0.9 --output smollm2-90
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import slicegpt
from slicegpt.progress import Progress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a folder, a hub id, a .gguf file or smollm2-135m")
parser.add_argument("--keep", type=float, default=0.9, help="fraction of all parameters to keep (0.9)")
parser.add_argument("--calibration", default="python-reference", help="text to calibrate on")
parser.add_argument("--nsamples", type=int, default=32)
parser.add_argument("--seqlen", type=int, default=512)
parser.add_argument("--output", required=True)
options = parser.parse_args()

result = slicegpt.slice(
    options.model,
    keep=options.keep,
    calibration=options.calibration,
    nsamples=options.nsamples,
    seqlen=options.seqlen,
    output=options.output,
    progress=Progress(),
)
print(result.report)

model = AutoModelForCausalLM.from_pretrained(options.output)  # `import slicegpt` has registered its class
tokenizer = AutoTokenizer.from_pretrained(options.output)
prompt = tokenizer("The for statement is used to", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))
