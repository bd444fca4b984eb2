"""The numbers of csrc/moduli.cuh against exact arithmetic."""

import math
import re
from pathlib import Path

import pytest

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "moduli.cuh"

pytestmark = pytest.mark.skipif(not HEADER.exists(), reason="needs the source tree")


def table(function):
    body = HEADER.read_text().split(f"constexpr {function}")[1]
    numbers = re.search(r"\{\s*([\d.f,\s]+)\}", body).group(1)
    return [float(item.strip().rstrip("f")) for item in numbers.split(",")]


def test_product_bits_are_rounded_down():
    moduli = [int(value) for value in table("uint32_t modulus")]
    bits = table("float product_bits")
    assert len(moduli) == 16
    assert len(bits) == 17
    for count, stated in enumerate(bits):
        product = math.prod(moduli[:count])
        assert stated <= math.log2(product) < stated + 0.02


def test_moduli_are_the_largest():
    """Greedily from 256 down: no number that is left out could replace a smaller one."""
    chosen = []
    for candidate in range(256, 1, -1):
        if all(math.gcd(candidate, other) == 1 for other in chosen):
            chosen.append(candidate)
    assert [int(value) for value in table("uint32_t modulus")] == chosen[:16]


def test_widest_result_fits():
    """131071 tokens of 53 bits a column, and the sum of as many products of residues in int32."""
    assert 2 * 53 + math.log2(131071) + 1 <= table("float product_bits")[16]
    assert 128 * 128 * 131071 < 2**31
