"""The text of a run that names none: a published one where the hub gives it, else one that needs no network."""

from __future__ import annotations

from slicegpt.calibration.documents import Split, load_documents
from slicegpt.calibration.mixture import SELF
from slicegpt.errors import SliceGPTError
from slicegpt.progress import Progress

PUBLISHED = "wikitext2"  # the paper's text, to calibrate and to evaluate on
OFFLINE_TEST = "python-reference"


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
        load_documents(PUBLISHED, split)  # the hub's library keeps it, so that it is not fetched twice
    except SliceGPTError as error:
        progress.warn(f"no text was named, and {PUBLISHED} cannot be had ({error.reason}): {instead}")
        return other
    return PUBLISHED
