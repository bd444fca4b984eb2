"""The text of a run that names none: a published one where the hub gives it, else one that needs no network."""

from __future__ import annotations

import importlib.util
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from slicegpt.calibration.documents import HUB_DATASETS, Split, load_documents
from slicegpt.calibration.mixture import SELF
from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress

PUBLISHED = "wikitext2"  # the paper's text, to calibrate and to evaluate on
OFFLINE_TEST = "python-reference"
# A hub that does not answer a connection in so many seconds is not there.
PATIENCE = 3.0


def default_calibration(progress: Progress) -> str:
    """`PUBLISHED` where it can be had, else text that the model writes, with a warning that says so."""
    return _published_or(
        SELF,
        "train",
        "calibrating on text that the model writes itself (self); a text of your own domain is better, alone or with "
        "it: NOTES.txt:4,self:1",
        progress,
    )


def default_test(progress: Progress) -> str:
    """`PUBLISHED` where it can be had, else Python's language reference, with a warning that says so."""
    return _published_or(
        OFFLINE_TEST,
        "test",
        "evaluating on Python's language reference (python-reference), whose perplexities compare models with each "
        "other and with no published figure",
        progress,
    )


def _published_or(other: str, split: Split, instead: str, progress: Progress) -> str:
    try:
        check_hub(PUBLISHED)
        load_documents(PUBLISHED, split)  # the hub's library keeps it, so that it is not fetched twice
    except SliceGPTError as error:
        progress.warn(f"no text was named, and {PUBLISHED} cannot be had ({error.reason}): {instead}")
        return other
    return PUBLISHED


def check_hub(name: str) -> None:
    """Refuse a data set of the hub that is not on this machine while the hub cannot be reached.

    The hub's library would try for half a minute, a line on the terminal each time. What only it can know it is asked:
    proxies, and what its cache holds.

    Raises:
        SliceGPTError: no connection can be opened.
    """
    from huggingface_hub import constants

    proxied = {"http", "https", "all"} & getproxies().keys()
    if importlib.util.find_spec("datasets") is None or constants.HF_HUB_OFFLINE or proxied:
        return
    host = urlsplit(constants.ENDPOINT)
    try:
        port = host.port or {"http": 80}.get(host.scheme, 443)
        with socket.create_connection((host.hostname, port), PATIENCE):
            return
    except OSError as error:
        from datasets import config

        kept = HUB_DATASETS[name].path.replace("/", "___")
        if not os.path.isdir(os.path.join(config.HF_DATASETS_CACHE, kept)):
            raise SliceGPTError(f"{host.hostname} cannot be reached: {error}", "spec") from error
