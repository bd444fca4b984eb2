"""A `slicegpt` under torchrun, one rank of which gets a signal in the middle of slicing: RANK SIGNAL ARGUMENTS..."""

import os
import signal
import sys

from slicegpt.cli import main
from slicegpt.slicing.propagation import Propagation

RANK, SIGNAL = int(sys.argv[1]), signal.Signals[sys.argv[2]]
BLOCK = 3
write = Propagation.write


def write_or_die(self, block, *arguments, **named):
    if block.index == BLOCK and int(os.environ["RANK"]) == RANK:
        os.kill(os.getpid(), SIGNAL)
    return write(self, block, *arguments, **named)


Propagation.write = write_or_die
sys.argv[1:] = sys.argv[3:]
sys.exit(main())
