"""The check of the order of overlapping kernels (tests/support/sass.py) itself, on code with planted mistakes.

The compiled kernels go through it in test_compile.py and tests/kernels/test_compile.py.
"""

import pytest
from support.sass import before, instructions, overlap_faults

SAFE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 BRA 0x40 ;                                      /* 0x0000000000fc8947 */
        /*0020*/                   CALL.REL.NOINC 0xa0 ;                           /* 0x0000000000fc8947 */
        /*0030*/                   CCTL.E.PF2 [R2] ;                               /* 0x000000000200798f */
        /*0040*/                   ACQBULK ;                                       /* 0x000000000000782e */
        /*0050*/                   PREEXIT ;                                       /* 0x000000000000782d */
        /*0060*/               @P1 LDG.E.128 R4, desc[UR8][R2.64] ;                /* 0x0000000802041981 */
        /*0070*/                   STG.E desc[UR8][R2.64], R4 ;                    /* 0x0000000402007986 */
        /*0080*/               @P0 EXIT ;                                          /* 0x000000000000094d */
        /*0090*/                   BRA 0x60 ;                                      /* 0xfffffffc00fc7947 */
        /*00a0*/                   LDS R7, [R8] ;                                  /* 0x0000000008077984 */
        /*00b0*/                   RET.REL.NODEC R4 0x0 ;                          /* 0x0000000004007950 */
"""
MISTAKES = {
    "read before the wait": ("LDC R1, c[0x0][0x28]", "LDG.E R1, desc[UR8][R2.64]", "before ACQBULK: LDG.E"),
    "in a called function": ("LDS R7, [R8]", "LDG.E R7, desc[UR8][R8.64]", "before ACQBULK: LDG.E"),
    "a path around the wait": ("BRA 0x40", "BRA 0x50", "PREEXIT before ACQBULK"),
    "an early end": ("CCTL.E.PF2 [R2]", "EXIT", "ends before ACQBULK"),
    "an atomic before it": (
        "CCTL.E.PF2 [R2]",
        "ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR8][R2.64], R5",
        "ATOMG",
    ),
    "no wait at all": ("ACQBULK", "NOP", "no ACQBULK"),
    "the next is never let in": ("PREEXIT", "NOP", "no PREEXIT"),
    "the next is let in late": ("PREEXIT", "LDG.E R9, desc[UR8][R2.64]", "no PREEXIT"),
}


def test_safe_code_has_no_faults():
    assert overlap_faults(SAFE) == []
    assert [one.name for one in before(instructions(SAFE), "ACQBULK")] == [
        "LDC", "BRA", "CALL", "CCTL", "LDS", "RET",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_found(name):
    old, new, message = MISTAKES[name]
    spoilt = SAFE.replace(f" {old} ;", f" {new} ;")
    assert spoilt != SAFE
    assert any(message in fault for fault in overlap_faults(spoilt)), overlap_faults(spoilt)


def test_a_conditional_wait_is_none():
    with pytest.raises(AssertionError, match="ACQBULK is conditional"):
        overlap_faults(SAFE.replace("                   ACQBULK", "               @P3 ACQBULK"))
