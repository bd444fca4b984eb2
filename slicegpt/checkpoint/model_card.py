"""The model card of a sliced folder, made from its `slicing.json`."""

import math

from slicegpt.checkpoint.outcome import asked_and_got, notes, outcome_rows, shape_rows
from slicegpt.recipe import FILE_NAME, STOCK

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- slicegpt
- compression
{custom_code}---

# {name}

{source}, compressed with [SliceGPT](https://arxiv.org/abs/2401.15024): columns and rows of every weight matrix
deleted along the principal components of the residual stream{and_others}. {weights}

{table}

{notes}

Removed: {removed:.1%} of all parameters, shortcuts and head counted{asked}. Slicing (1 - d / D): {slicing:.1%}.
Calibration: {tokens:,} tokens of {calibration}, seed {seed}.{recipe}
{finetuning}
```python
{imports}
model = AutoModelForCausalLM.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```

The licence of the original model applies. Evaluate the sliced model on your own task before you rely on it.
"""

_WITH_PACKAGE = """import slicegpt  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
"""
_STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer
"""
_WITHOUT_PACKAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

# The network is in this repository. After `import slicegpt`, where it is installed, nothing has to be trusted.
"""


def _and_others(record: dict) -> str:
    """What else was deleted: ", and MLP neurons"."""
    counts = {"neurons": "MLP neurons", "query_heads": "attention heads"}
    deleted = [name for count, name in counts.items() if record.get(count) != record.get(f"dense_{count}")]
    return f", and {' and '.join(deleted)}" if deleted else ""


def _imports(record: dict, self_contained: bool) -> str:
    if record.get("form") == STOCK:
        return _STOCK
    return _WITHOUT_PACKAGE if self_contained else _WITH_PACKAGE


def _describe_finetuning(run: dict | None) -> str:
    """One sentence on the `finetuning` of a record; nothing where there was none."""
    if run is None:
        return ""
    result, adapters = run["result"], run["adapters"]
    before, after = (math.exp(min(result[key], 700)) for key in ("loss_before", "loss_after"))
    return (
        f"Fine-tuned after slicing: low-rank adapters (r = {adapters['rank']}), merged, trained on"
        f" {result['tokens']:,} tokens of {run['data']['source']}; perplexity of its held-out part {before:.4g} before,"
        f" {after:.4g} after.\n"
    )


def _weights(record: dict) -> str:
    """One sentence on what the weights are."""
    stored = record.get("stored_as", record["dtype"])
    if stored == record["dtype"]:
        return "All weights are dense."
    return f"Stored as {stored}, in compressed-tensors' format: `pip install compressed-tensors`."


def _table(record: dict) -> str:
    """Dense and sliced side by side, in Markdown."""
    rows = outcome_rows(record) + shape_rows(record)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model_card(record: dict, name: str, self_contained: bool = True, recipe: bool = False) -> str:
    """Markdown with a metadata header, as the Hugging Face hub shows it.

    Args:
        record: `slicing.json`.
        name: of the folder or the hub repository, as `from_pretrained` takes it.
        self_contained: the modelling code is beside the weights, and is loaded with `trust_remote_code`.
        recipe: the choices that made the model are beside them.
    """
    size, calibration = record["size"], record["calibration"]
    asked = asked_and_got(record)
    return _CARD.format(
        name=name,
        custom_code="- custom_code\n" if self_contained else "",
        imports=_imports(record, self_contained),
        arguments=f'"{name}", trust_remote_code=True' if self_contained else f'"{name}"',
        source=record["source"],
        table=_table(record),
        notes="\n".join(f"- {note}" for note in notes(record)),
        asked="" if asked is None else f" ({asked})",
        weights=_weights(record),
        and_others=_and_others(record),
        removed=size["removed"],
        slicing=record["slicing"],
        tokens=calibration["tokens"],
        calibration=calibration["source"],
        seed=calibration["seed"],
        recipe=f" All choices: `{FILE_NAME}`." if recipe else "",
        finetuning=_describe_finetuning(record.get("finetuning")),
    )
