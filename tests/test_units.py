"""Sizes in bytes, against the definitions of the units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slicegpt.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("400MB", 400 * 1000**2),
        ("400 mb", 400 * 1000**2),
        ("400MiB", 400 * 1024**2),
        ("1.5GiB", 1.5 * 1024**3),
        ("8GB", 8 * 1000**3),
        ("2TB", 2 * 1000**4),
        ("3TiB", 3 * 1024**4),
        ("7kB", 7000),
        ("7KiB", 7168),
        ("512", 512),
        ("512B", 512),
        ("1.5e9", 1.5e9),
        (".5kB", 500),
        (" 5 GB ", 5e9),
    ],
)
def test_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MB", "-1MB", "0", "0MB", "nan", "inf", "1e999", "5 XB", "1,5GB", "٣MB", "5Gib2"]
)
def test_no_size(text):
    with pytest.raises(ValueError, match="must be a number of bytes such as 400MB"):
        parse_bytes(text)


@given(st.floats(min_value=1e-3, max_value=1e18))
def test_plain_numbers_are_themselves(value):
    assert parse_bytes(repr(value)) == value
