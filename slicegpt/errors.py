"""The one exception that bad input raises."""


class SliceGPTError(ValueError):
    """Bad input, told in one line that names the argument, its value and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """
