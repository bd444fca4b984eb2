"""Options of `slicegpt slice` that the parser alone decides."""

import pytest

from slicegpt.cli import build_parser

ARGUMENTS = ["slice", "MODEL", "--slice", "0.25", "--output", "OUT"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), "auto"),
        (("--activation-storage", "host"), "host"),
        (("--signals", "device"), "device"),  # the former name
    ],
)
def test_activation_storage(given, expected):
    assert build_parser().parse_args([*ARGUMENTS, *given]).activation_storage == expected


def test_the_former_name_is_not_shown(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["slice", "--help"])
    shown = capsys.readouterr().out
    assert "--activation-storage" in shown
    assert "--signals" not in shown
