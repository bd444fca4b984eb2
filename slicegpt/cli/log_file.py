"""`--log-file`: what every command says, with timestamps, in a file."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from slicegpt.errors import SliceGPTError

# Stages and notices, which the terminal has already; `slicegpt.progress` cannot be imported before tqdm is needed.
PROGRESS = "slicegpt.progress"
_FORMAT = "%(asctime)s %(message)s"


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, with the option that all of them have."""

    def __init__(self, **options):
        super().__init__(**options)
        # A command of a command has it twice, and what is not given must not take the place of what is.
        self.add_argument_group("log").add_argument(
            "--log-file",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="also append stages, notices and warnings to FILE, with timestamps",
        )


def configure(verbose: bool) -> None:
    """Notices on standard error: those of level WARNING, all of them where `verbose`."""
    level = logging.DEBUG if verbose else logging.WARNING
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        handler.setLevel(level)
        handler.addFilter(_without_progress)
        logging.getLogger().addHandler(handler)
    logging.getLogger("slicegpt").setLevel(level)


def _without_progress(record: logging.LogRecord) -> bool:
    return record.name != PROGRESS


@contextmanager
def logged(file: str | None, verbose: bool) -> Iterator[None]:
    """Within it, what is said goes to the end of `file` as well; None: nowhere.

    Raises:
        SliceGPTError: the file cannot be written.
    """
    if file is None:
        yield
        return
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise SliceGPTError(f"cannot write {file}: {error.strerror}", "log_file") from error
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger, progress = logging.getLogger("slicegpt"), logging.getLogger(PROGRESS)
    level, show = logger.level, warnings.showwarning

    def show_and_log(message, category, filename, lineno, file=None, line=None):
        show(message, category, filename, lineno, file, line)
        progress.info("warning: %s", " ".join(str(message).split()))

    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.addHandler(handler)
    warnings.showwarning = show_and_log
    try:
        yield
    finally:
        warnings.showwarning = show
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def log(line: str) -> None:
    """To the log file alone."""
    logging.getLogger(PROGRESS).info(line)
