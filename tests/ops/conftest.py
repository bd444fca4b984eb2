"""What the tests of the CPU's kernels share."""

import pytest
import torch

from slicegpt.ops import cpu_decode

SETS = cpu_decode._cpu.instruction_sets() if cpu_decode.why_not() is None else []


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Each instruction set of this processor in turn; as before afterwards."""
    before = cpu_decode.use_instruction_set(request.param)
    yield request.param
    cpu_decode.use_instruction_set(before)


@pytest.fixture
def threads():
    """Set the number of threads; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
