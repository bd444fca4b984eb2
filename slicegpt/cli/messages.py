"""Errors as the command line tells them: in the place of the library's argument stands the user's option.

An argument is mostly called as its option is, `refit_share` and `--refit-share`; the table holds the others.
"""

import argparse

from slicegpt.errors import SliceGPTError
from slicegpt.recipe import NAMES, SIZES

_SIZES = ", ".join(f"--{name.replace('_', '-')}" for name in SIZES)

EVERYWHERE = {"path": "--json", "spec": "--data", "documents": "--data", "names": "--tasks"}
# Command -> argument of the library -> option.
OPTIONS = {
    "slice": {
        "model": "MODEL",
        "size": _SIZES,
        "spec": "--calibration",
        "fitted": "--refit-share",
        "neuron_multiple": "--round-to",
    },
    "eval": {"model": "MODEL"},
    "generate": {"model": "MODEL", "max_length": "--max-new-tokens", "input_ids": "--prompt"},
    "info": {"model": "MODEL"},
    "frontier": {
        "model": "MODEL",
        "size": "--sizes",
        "target": "--sizes",
        "methods": "--method",
        "python": "--sparsegpt-python",
        "file": "--output",
    },
    "demo": {"size": "--keep", "spec": "--data", "calibration": "--data"},
    "finetune": {"folder": "DIR"},
    "serve": {"model": "MODEL"},
    "push": {"folder": "DIR", "repo_id": "USER/NAME"},
    "bench": {"spec": "--calibration", "batch": "--batch-size"},
}


def option_of(argument: str, options: argparse.Namespace) -> str | None:
    """The option of a command that sets an argument of the library; None where it has none."""
    table = EVERYWHERE | OPTIONS.get(options.command, {})
    if argument in table:
        return table[argument]
    known = set(vars(options)) | (set(NAMES) if options.command == "slice" else set())
    return f"--{argument.replace('_', '-')}" if argument in known else None


def message_of(error: SliceGPTError, options: argparse.Namespace) -> str:
    """An error in one line, with the option in the place of the argument that is at fault."""
    option = None if error.argument is None else option_of(error.argument, options)
    text = str(error) if option is None else f"{option}: {error.reason}"
    return " ".join(text.split())
