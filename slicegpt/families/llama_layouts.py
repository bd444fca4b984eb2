"""Families that are Llama under a name of their own; which biases they have is read off the tensors."""

from dataclasses import replace

from .llama import LLAMA

SEED_OSS = replace(LLAMA, model_type="seed_oss", architectures=("SeedOssForCausalLM",))

# transformers loads these three into its Llama classes, and renames a checkpoint's tensors where they had other names.
EXAONE = replace(LLAMA, model_type="exaone")
INTERNLM3 = replace(LLAMA, model_type="internlm3")
IQUEST_CODER = replace(LLAMA, model_type="iquestcoder")
