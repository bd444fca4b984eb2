"""Runs in an environment with llm-compressor: FOLDER/dense and FOLDER/samples.safetensors to FOLDER/sparse."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    samples = [ids.tolist() for _, ids in sorted(load_file(folder / "samples.safetensors").items())]
    dataset = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset,
        recipe=SparseGPTModifier(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]
        ),
        max_seq_length=max(map(len, samples)),
        num_calibration_samples=len(samples),
    )
    with torch.no_grad():
        model.save_pretrained(folder / "sparse", save_compressed=False)
    tokenizer.save_pretrained(folder / "sparse")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
