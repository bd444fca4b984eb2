"""What commands print for bad input."""

from slicegpt.cli import main


def bad(capsys, *arguments) -> str:
    """The one line that bad input prints, after exit code 2."""
    assert main(list(map(str, arguments))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"slicegpt {arguments[0]}: error: ")
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]
