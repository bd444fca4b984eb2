"""The order of instructions in machine code, along every path: what programmatic dependent launch rests on.

`ACQBULK` waits for the kernels ahead, `PREEXIT` lets the next one start (griddepcontrol.wait and launch_dependents). A
kernel that starts early may read only what no kernel ahead writes until it has waited; and it must let the next one
start only behind its own wait. Then waiting for one kernel waits for all before it: a kernel that has passed ACQBULK
knows that the one ahead has ended, and that one had itself waited for the one before. So on every path through a kernel

- nothing touches global memory before ACQBULK, prefetches into L2 aside, which have no value to be stale;
- PREEXIT comes behind ACQBULK;
- no thread ends without having waited: the kernel would count as ended, and the next could pass its own wait.
"""

import re
from dataclasses import dataclass

# Loads, stores and atomics that may reach global memory, copies of the asynchronous engines. LDG, LD; not LDS, LDC,
# LDSM, LDL, LDGSTS is one as well.
GLOBAL = re.compile(
    r"(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED|UTMA\w*|SURED|SULD|SUST|TEX|TLD)\b"
)
PREFETCH = re.compile(r"CCTL\.E\.PF|CCTL\.PF|UBLKPF|UTMAPF|CCTL\.E\.PF2")
ENDS = {"EXIT", "RET", "KILL", "BRX", "JMX"}


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    predicate: str | None
    text: str

    @property
    def name(self) -> str:
        return self.text.split()[0].split(".")[0]

    @property
    def always(self) -> bool:
        """Executed whatever the predicates hold."""
        return self.predicate in (None, "@PT", "@UPT")

    @property
    def target(self) -> int | None:
        """Where a branch or call goes."""
        found = re.search(r"\b(0x[0-9a-f]+)\s*$", self.text)
        return int(found[1], 16) if found and self.name in ("BRA", "CALL", "JMP", "BSSY") else None

    @property
    def touches_global(self) -> bool:
        return bool(GLOBAL.match(self.text)) and not PREFETCH.match(self.text)


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one function, in order."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][^;]*?)\s*;", sass)
    return [Instruction(int(address, 16), predicate or None, text) for address, predicate, text in found]


def following(code: list[Instruction], places: dict[int, int], index: int) -> list[int]:
    """Indices of what may come next. A call leads to its function and behind the call; a return leads nowhere else.

    places: address -> index.
    """
    one = code[index]
    conditional = not one.always or re.match(r"BRA(\.\w+)* (!?U?P\w+|UR?\w+),", one.text) is not None
    after = [] if one.name in ENDS and not conditional else [index + 1]
    if one.name in ("BRA", "JMP"):
        after = [index + 1] if conditional or ".DIV" in one.text or ".CONV" in one.text else []
    if one.name in ("BRA", "JMP", "CALL") and one.target is not None:
        after.append(places[one.target])
    return [at for at in after if at < len(code)]


def before(code: list[Instruction], barrier: str) -> list[Instruction]:
    """What some path executes before it has come to `barrier`, in the order of the code."""
    seen, todo, places = set(), [0], {one.address: index for index, one in enumerate(code)}
    while todo:
        index = todo.pop()
        if index in seen:
            continue
        if code[index].name == barrier:
            if code[index].always:
                continue
            raise AssertionError(f"{barrier} is conditional: {code[index].predicate} {code[index].text}")
        seen.add(index)
        todo += following(code, places, index)
    return [code[index] for index in sorted(seen)]


def overlap_faults(sass: str) -> list[str]:
    """What of the above a kernel breaks; empty where it is safe."""
    code = instructions(sass)
    if not any(one.name == "ACQBULK" for one in code):
        return ["there is no ACQBULK: the kernel never waits for the ones ahead"]
    early = before(code, "ACQBULK")
    faults = [f"before ACQBULK: {one.text}" for one in early if one.touches_global]
    faults += [f"ends before ACQBULK: {one.text}" for one in early if one.name == "EXIT"]
    faults += ["PREEXIT before ACQBULK" for one in early if one.name == "PREEXIT"]
    late = [one for one in before(code, "PREEXIT") if one.touches_global]
    if not any(one.name == "PREEXIT" for one in code):
        return [*faults, "there is no PREEXIT: the next kernel starts when this one has ended"]
    # Not wrong, but the next kernel starts later than it could.
    return faults + [f"before PREEXIT: {one.text}" for one in late]


def longest_loop(text: str) -> int:
    """Instructions of the longest loop: from the target of a branch backwards to the branch."""
    body = instructions(text)
    spans = [
        (one.target, one.address)
        for one in body
        if one.name == "BRA" and one.target is not None and one.target < one.address
    ]
    return max(sum(begin <= one.address <= end for one in body) for begin, end in spans)
