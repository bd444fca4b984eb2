"""The one exception that bad input raises."""


class SliceGPTError(ValueError):
    """Bad input, told in one line that names the argument, its value and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
