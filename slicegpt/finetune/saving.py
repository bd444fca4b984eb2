"""What a run leaves behind: its result, its record, and the folder of adapters that are kept apart."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt.checkpoint.folders import atomic_folder
from slicegpt.checkpoint.record import versions
from slicegpt.finetune.adapters import ADAPTER
from slicegpt.finetune.data import TrainingText
from slicegpt.finetune.options import AdapterOptions, TrainingOptions
from slicegpt.table import write_json


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        output: the folder that was written.
        loss_before, loss_after: mean loss of a held-out token in nats, of the sliced model and of the best state,
            which is the one that was kept. Both as the run computed them, in its precision.
        best_step, steps: optimizer steps up to the state that was kept, and in all.
        tokens: tokens trained on, in all.
        trained_parameters: elements of adapters and trained shortcuts.
        seconds: training and evaluation, those before an interruption included.
    """

    output: Path
    loss_before: float
    loss_after: float
    best_step: int
    steps: int
    tokens: int
    trained_parameters: int
    seconds: float


def run_record(
    result: FinetuneResult,
    source: str,
    adapters: AdapterOptions,
    options: TrainingOptions,
    teacher: str | None,
    text: TrainingText,
) -> dict:
    """What `slicing.json` (or `finetuning.json` beside adapters) says of the run."""
    figures = dataclasses.asdict(result)
    del figures["output"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "data": {
            "source": source,
            "windows": len(text.train),
            "held_out": len(text.held_out),
            "sha256": text.sha256(),
        },
        "adapters": dataclasses.asdict(adapters),
        "training": dataclasses.asdict(options),
        "teacher": teacher,
        "result": figures,
    }


def save_adapters(
    adapted: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entry: dict,
    folder: str | Path,
    path: Path,
) -> None:
    """Write a PEFT folder: adapters and trained shortcuts alone."""
    with atomic_folder(path) as temporary:
        adapted.peft_config[ADAPTER].base_model_name_or_path = str(Path(folder).resolve())
        adapted.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "finetuning.json", entry)
        (temporary / "README.md").write_text(
            f"""---
library_name: peft
tags:
- slicegpt
- lora
---

# {path.name}

Low-rank adapters for the sliced model `{Path(folder).name}`; held-out perplexity
{math.exp(entry["result"]["loss_before"]):.4g} before, {math.exp(entry["result"]["loss_after"]):.4g} with them.

```python
import slicegpt  # registers the architecture with transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{Path(folder).name}")
model = PeftModel.from_pretrained(model, "{path.name}")
```
""",
            encoding="utf-8",
        )
