"""Folders that load without this package: the network's source beside its weights, named in `auto_map`.

The source is that of the network in `slicegpt.modeling`, whose files for this reason import nothing of slicegpt but
each other.
"""

import json
import re
from pathlib import Path

import slicegpt
from slicegpt import modeling

# Module of slicegpt.modeling -> its name in the folder, in the style of Hugging Face's model folders.
MODULES = {
    "configuration": "configuration_slicegpt",
    "configuration_checks": "configuration_checks_slicegpt",
    "layers": "layers_slicegpt",
    "quantized": "quantized_slicegpt",
    "experts": "experts_slicegpt",
    "latent_attention": "latent_attention_slicegpt",
    "network": "modeling_slicegpt",
    "heads": "heads_slicegpt",
}
AUTO_MAP = {
    "AutoConfig": "configuration_slicegpt.SlicedConfig",
    "AutoModel": "modeling_slicegpt.SlicedModel",
    "AutoModelForCausalLM": "modeling_slicegpt.SlicedForCausalLM",
    "AutoModelForSequenceClassification": "heads_slicegpt.SlicedForSequenceClassification",
    "AutoModelForTokenClassification": "heads_slicegpt.SlicedForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_slicegpt.SlicedForQuestionAnswering",
}
_HEADER = (
    "# Written by slicegpt {version} from slicegpt/modeling/{module}.py (MIT licence); change it there.\n"
)
_RELATIVE_IMPORT = re.compile(r"^from \.(\w+) import", re.MULTILINE)


def portable_source(module: str) -> str:
    """The source of a module of `slicegpt.modeling` as it stands in a folder: imports renamed, all else as it is."""
    source = Path(modeling.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    source = _RELATIVE_IMPORT.sub(lambda match: f"from .{MODULES[match[1]]} import", source)
    return _HEADER.format(version=slicegpt.__version__, module=module) + source


def modeling_files() -> dict[str, bytes]:
    """The modelling code as it stands in a folder: name of the file -> content."""
    return {f"{name}.py": portable_source(module).encode() for module, name in MODULES.items()}


def with_auto_map(config: dict, self_contained: bool = True) -> dict:
    """`config.json` as a dictionary, with the classes of its folder named in it, or without."""
    plain = {name: value for name, value in config.items() if name != "auto_map"}
    return plain | {"auto_map": AUTO_MAP} if self_contained else plain


def write_modeling_code(folder: Path) -> None:
    """Make a saved model self-contained: modelling code beside the weights, `auto_map` in `config.json`.

    It then loads with `trust_remote_code=True` where slicegpt is not installed. Where slicegpt is imported, its own
    classes are used, as before, and nothing has to be trusted.
    """
    for name, content in modeling_files().items():
        (folder / name).write_bytes(content)
    _rewrite_config(folder, self_contained=True)


def leave_out_modeling_code(folder: Path) -> None:
    """The opposite: no `auto_map`, which a model that came from a self-contained folder brings along."""
    for name in modeling_files():
        (folder / name).unlink(missing_ok=True)
    _rewrite_config(folder, self_contained=False)


def config_text(config: dict) -> str:
    """`config.json` as transformers writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _rewrite_config(folder: Path, self_contained: bool) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(config_text(with_auto_map(config, self_contained)), encoding="utf-8")
