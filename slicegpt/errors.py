"""The one exception that bad input raises."""

from collections.abc import Iterator
from contextlib import contextmanager


class SliceGPTError(ValueError):
    """Bad input, told in one line that names the argument, its value and what was expected.

    The command line prints it without a traceback and exits with code 2; it names its own option (`--refit-share`) in
    the place of the argument (`slicegpt.cli.messages`).

    Args:
        reason: what was expected, and what was given instead.
        argument: the argument at fault, as the library calls it; the message is then `argument: reason`. None where it
            is not one argument's fault.

    Attributes:
        reason, argument: as given.
    """

    def __init__(self, reason: str, argument: str | None = None):
        super().__init__(reason if argument is None else f"{argument}: {reason}")
        self.reason, self.argument = reason, argument


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name where it has none.

    The message of a `KeyError` is its bare key, which says nothing alone.
    """
    if type(error) is KeyError and error.args and " " not in str(error.args[0]):
        return f"unknown key {error.args[0]!r}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Within it, an error about an argument is one about the caller's own: `renamed(spec="calibration")`."""
    try:
        yield
    except SliceGPTError as error:
        if error.argument in names:
            raise SliceGPTError(error.reason, names[error.argument]) from error
        raise
