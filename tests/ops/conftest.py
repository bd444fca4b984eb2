"""What the tests of the CPU's kernels share."""

import pytest
import torch

from slicegpt.ops.cpu import extension


@pytest.fixture(params=extension.instruction_sets())
def instruction_set(request):
    """Each instruction set of this processor in turn; as before afterwards."""
    before = extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(before)


@pytest.fixture
def threads():
    """Set the number of threads; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
