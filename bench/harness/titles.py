"""What a result is called: its kind, what it was run on, and where."""

from collections.abc import Mapping
from pathlib import Path

# In the order of the page of results.
TITLES = {
    "token": "Time per token",
    "throughput": "Throughput",
    "sizes": "Sizes side by side",
    "frontier": "Perplexity over size",
    "equal size": "Shortcuts at equal size",
    "recovery": "Recovery by fine-tuning",
    "evaluation": "Evaluation",
    "demo": "Demo",
    "slicing record": "A sliced model",
    "model": "A model",
    "finetuning": "Fine-tuning",
    "generation": "Generation",
    "conversation": "Conversation",
    "layers": "One transformer layer",
    "speculative": "Speculative decoding",
    "vllm": "vLLM",
    "slicing": "Cost of slicing",
    "plan": "Plan of a run",
    "memory": "Memory of a run, and its plan",
    "ranks": "Several ranks",
    "resume_kills": "Runs that were killed and resumed",
    "refit": "Cost of the refit",
    "gram": "Covariance (gram_)",
    "rotation": "Fused operators",
    "decode attention": "Attention of a decoding step",
    "tuned": "Tuned launch configurations",
    "kernels": "Kernels (pytest-benchmark)",
    "predict": "Prediction",
    "published": "Published figures, predicted",
    "ceilings": "What the device reaches",
    "overlap": "Overlapping kernels, bit for bit",
    "speedup": "Speed-ups asked for and measured",
    "planes": "Residue planes of real activations",
    "expert refit": "Refit of experts against their own weights",
    "rehearsal": "Rehearsal of the GPU benchmarks",
    "plans": "Plans of one size",
    "environment": "Environment",
}


def subject_of(content: Mapping) -> str:
    """The models or shape that a result is of; empty where it does not say."""
    if content["benchmark"] == "published":
        return ""  # its settings are those of another prediction
    settings = content.get("settings") or content.get("options") or {}
    models = settings.get("model") or settings.get("models") or settings.get("dense") or []
    models = [Path(name).name for name in ([models] if isinstance(models, str) else models)]
    return settings.get("shape") or ", ".join(models)


def title_of(content: Mapping) -> str:
    """The benchmark and what it was run on."""
    name, subject = TITLES.get(content["benchmark"], content["benchmark"]), subject_of(content)
    return f"{name}: {subject}" if subject else name


def threads_of(environment: Mapping) -> str:
    count = environment["threads"]
    return f"{count} thread{'s' if count > 1 else ''}"
