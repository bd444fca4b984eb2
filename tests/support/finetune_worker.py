"""A `slicegpt finetune` that is killed while its checkpoint of a given step is half written."""

import os
import signal
import sys

from slicegpt.cli import main
from slicegpt.finetune.trainer import RecoveryTrainer

STEP = int(sys.argv[1])
whole = RecoveryTrainer._save_rng_state


def half(self, folder):
    if self.state.global_step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, folder)


RecoveryTrainer._save_rng_state = half
main(sys.argv[2:])
