"""Whether the other processes of a job are still there: a heartbeat in a thread of its own.

A collective operation cannot tell. Decisions of rank 0 take minutes with large models, so that the others must be able
to wait for as long as it takes; a process that has been stopped (`SIGSTOP`, a machine that hangs) keeps its connections
open, so that those who wait for it would wait forever. So each process counts up a number of its own in the job's store
every few seconds and watches that of the next one: of any number of processes that are gone, one at least is watched by
one that is there. The thread needs no more than the interpreter's lock, which PyTorch's operators and this package's
kernels release while they compute.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# Seconds between two beats, and those after which a process without one is taken for dead: half a minute, after which
# torchrun may wait another half for a stopped process before it kills it, so that the job is over within a minute.
BEAT, LIMIT = 2.0, 25.0
# The first beat may take as long as importing torch from a cold, shared disk.
FIRST_LIMIT = 300.0
EXIT_CODE = 1


class Watch:
    """Beats for this process, and ends it once another one is gone or the launcher asks for it (`SIGTERM`).

    Args:
        store: the job's `torch.distributed` store, a connection of the watch's own: others block while they wait.
        rank, size: of this process.
        say: prints one line; called in one process of the job alone, the first to notice.
        beat, limit, first_limit: seconds, see `BEAT`, `LIMIT` and `FIRST_LIMIT`.
        clock: seconds that only grow.
        leave: ends the process.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        say: Callable[[str], object],
        beat: float = BEAT,
        limit: float = LIMIT,
        first_limit: float = FIRST_LIMIT,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ):
        self.store, self.rank, self.say, self.clock, self.leave = store, rank, say, clock, leave
        self.beat_seconds, self.limit, self.first_limit = beat, limit, first_limit
        self.watched = (rank + 1) % size
        self.count, self.changed = 0, clock()
        self.looked = self.changed
        self.reporting = False
        self._lock = threading.Lock()
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._previous: tuple[Any, int] | None = None
        self._thread = threading.Thread(target=self._run, name="slicegpt watch", daemon=True)

    def start(self) -> None:
        """Begin; in the main thread, `SIGTERM` is answered from here on.

        A handler in Python waits for the main thread, which may be inside an operator for minutes; the wake-up
        descriptor reaches the watching thread at once.
        """
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGTERM, lambda signum, frame: None)
            self._previous = handler, signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """End the watching, as before `start`."""
        if self._previous is not None:
            handler, descriptor = self._previous
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(descriptor)
        os.write(self._waker, b"\0")
        self._thread.join()
        os.close(self._wake)
        os.close(self._waker)

    def speaks(self) -> bool:
        """Whether this process is the one that says why the job ends: the first that asks. It is then left alone."""
        with self._lock:
            if self.reporting:
                return True
            try:
                self.reporting = self.store.add("spoken", 1) == 1
            except Exception:  # the store has gone, and with it the launcher: better two lines than none
                self.reporting = True
            return self.reporting

    def look(self) -> str | None:
        """Beat, and look whether the watched process did; what to say where it did not."""
        try:
            self.store.add(f"beats/{self.rank}", 1)
            count = self.store.add(f"beats/{self.watched}", 0)
        except Exception:  # torch.distributed has several of them for a connection that is lost
            return "the launcher, or the node of rank 0, is gone"
        now = self.clock()
        # A process that was suspended itself has not been looking: it gives the other one its time again.
        if count != self.count or now - self.looked > self.limit / 2:
            self.count, self.changed = count, now
        self.looked = now
        if now - self.changed > (self.limit if count else self.first_limit):
            return f"rank {self.watched} has not answered for {now - self.changed:.0f} s"
        return None

    def _run(self) -> None:
        while True:
            reason = self.look()
            if reason is None and select.select([self._wake], [], [], self.beat_seconds)[0]:
                signals = os.read(self._wake, 64)
                if 0 in signals:
                    return
                if signal.SIGTERM in signals:
                    reason = "the launcher ends this job: a rank has died, or it was cancelled"
            if reason is None:
                continue
            if self.reporting:  # the main thread is saying what happened, and ends the process
                return
            if self.speaks():
                self.say(reason)
            self.leave(EXIT_CODE)
            return
