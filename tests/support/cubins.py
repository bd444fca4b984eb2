"""What a compiled kernel consists of: its disassembly and the resources it takes. Triton carries the tools."""

import os
import re
import subprocess
import tempfile

import triton


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code as text, and the resource report."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        return tuple(
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )


def assert_no_spills(sass: str, resources: str) -> None:
    stack = re.search(r"STACK:(\d+)", resources)
    assert stack is not None, resources
    assert int(stack[1]) == 0, resources
    assert not re.search(r"\b(LDL|STL)\b", sass)


def registers(resources: str) -> int:
    """A thread's."""
    return int(re.search(r"REG:(\d+)", resources)[1])
