"""Sizes in bytes as people write them: `400MB`, `1.5 GiB`, `8e9`."""

from __future__ import annotations

import re

# Powers of 1000, as disks and memory bandwidths are quoted, and of 1024, which the letter i tells apart.
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{binary}b": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for binary in ("", "i")
}
_SIZE = re.compile(r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmgt]?i?b)?", re.ASCII)
EXPECTED = "a number of bytes such as 400MB, 1.5GiB or 8e9"


def parse_bytes(text: str) -> float:
    """Bytes in a text: a number, alone or with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024).

    Raises:
        ValueError: it is no such text, or not above 0 and finite.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    value = float(match[1]) * _UNITS.get(match[2] or "", 0) if match else 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"must be {EXPECTED}, got {text!r}")
    return value
