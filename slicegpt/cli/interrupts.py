"""Ctrl-C: one line on standard error and exit code 130, at whatever moment it comes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
MESSAGE = "interrupted; nothing was written under the final name"

_received = False
_remark = ""


def install() -> None:
    """Answer SIGINT in a process that is the command's own, from before the first heavy import on.

    Where SIGINT is ignored (a job in the background of a script) or somebody else's, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def received() -> bool:
    """Whether SIGINT has come: then an error of any kind may be its consequence.

    Libraries turn a KeyboardInterrupt into an exception of their own here and there; C extensions that are being
    imported make it an ImportError.
    """
    return _received


@contextmanager
def remark(make: Callable[[], str | None]) -> Iterator[None]:
    """Within it, what an interruption ends is told of by `make()` as well, once all has been tidied up."""
    global _remark
    try:
        yield
    except BaseException:
        _remark = make() or ""
        raise


def message() -> str:
    """The one line that an interruption prints."""
    return f"{MESSAGE}; {_remark}" if _remark else MESSAGE


def forget() -> None:
    """A KeyboardInterrupt has been answered, and the command goes on."""
    global _received
    _received = False


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within it the first SIGINT only makes the function that it yields return True; the next one interrupts.

    Work that asks that function between its steps ends where it is whole. Where SIGINT is ignored, it stays so.
    """
    asked = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
        elif callable(before):
            before(signum, frame)

    before = signal.getsignal(signal.SIGINT)
    # Python sets handlers in the main thread alone; None: somebody's in C.
    ours = threading.current_thread() is threading.main_thread() and before not in (signal.SIG_IGN, None)
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def ignore() -> None:
    """No further SIGINT: the process is ending already."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupted(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = True
    if _command_is_importing(frame):
        # Nothing has been written, so there is nothing to clean up. An exception would have to pass through modules
        # that are half executed, some of which swallow it, and others print a traceback for it.
        os.write(2, f"{MESSAGE}\n".encode())
        os._exit(EXIT_CODE)
    raise KeyboardInterrupt


def _command_is_importing(frame: FrameType | None) -> bool:
    """Whether a module of this package imports something at this moment, rather than the work that it has begun."""
    importer, in_import_system = None, False
    while frame is not None:  # from the innermost call to the outermost: the last importer counts
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            in_import_system = True
        elif in_import_system:
            importer, in_import_system = frame, False
        frame = frame.f_back
    return importer is not None and importer.f_globals.get("__name__", "").startswith("slicegpt.cli")
