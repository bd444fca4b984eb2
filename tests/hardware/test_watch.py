"""A rank that is gone is noticed, whether it broke off or only stands still."""

import os
import signal
import time

import pytest

from slicegpt.hardware.watch import EXIT_CODE, Watch


class Store:
    """A job's store, in one process."""

    def __init__(self):
        self.counts = {}

    def add(self, name: str, count: int) -> int:
        self.counts[name] = self.counts.get(name, 0) + count
        return self.counts[name]


class Broken(Store):
    def add(self, name, count):
        raise RuntimeError("Connection reset by peer")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(store, rank=0, size=2, **options) -> Watch:
    return Watch(store, rank, size, print, beat=2.0, limit=25.0, first_limit=300.0, **options)


def test_ranks_that_beat_are_left_alone():
    store, clock = Store(), Clock()
    pair = [watch(store, rank, clock=clock) for rank in (0, 1)]
    for _ in range(1000):
        clock.now += 2.0
        assert [each.look() for each in pair] == [None, None]


@pytest.mark.parametrize(("beats", "after"), [(3, 25.0), (0, 300.0)])
def test_rank_without_a_beat_is_dead(beats, after):
    """One that has begun to beat has less time than one that still imports torch."""
    store, clock = Store(), Clock()
    first = watch(store, size=4, clock=clock)
    for _ in range(beats):
        store.add("beats/1", 1)
        clock.now += 2.0
        assert first.look() is None
    begin = clock.now
    while (reason := first.look()) is None:
        clock.now += 2.0
    assert clock.now - begin == pytest.approx(after, abs=2.0)
    assert reason == f"rank 1 has not answered for {clock.now - begin:.0f} s"


def test_every_rank_is_watched():
    store = Store()
    assert sorted(watch(store, rank, size=5).watched for rank in range(5)) == list(range(5))


def test_suspended_rank_accuses_nobody():
    """Where a whole job was suspended for an hour, nobody has had the time to beat."""
    store, clock = Store(), Clock()
    pair = [watch(store, rank, clock=clock) for rank in (0, 1)]
    for pause in (2.0, 2.0, 3600.0, 2.0, 2.0):
        clock.now += pause
        assert [each.look() for each in pair] == [None, None]


def test_store_that_is_gone():
    assert watch(Broken()).look() == "the launcher, or the node of rank 0, is gone"
    assert watch(Broken()).speaks()  # better two lines than none


def test_one_rank_speaks():
    store = Store()
    pair = [watch(store, rank) for rank in (0, 1)]
    assert pair[1].speaks()
    assert not pair[0].speaks()
    assert pair[1].speaks()


@pytest.mark.parametrize("first", [True, False])
def test_launcher_that_ends_the_job_is_answered_at_once(first):
    """The main thread may be inside an operator for minutes: here it never runs Python until the process would end."""
    store, said, left = Store(), [], []
    if not first:
        store.add("spoken", 1)
    here = Watch(store, 0, 2, said.append, beat=60.0, leave=left.append)
    before = signal.getsignal(signal.SIGTERM)
    here.start()
    try:
        while "beats/1" not in store.counts:  # it has looked, and now waits for a minute
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        here._thread.join(timeout=30)
        assert left == [EXIT_CODE]
        assert said == ["the launcher ends this job: a rank has died, or it was cancelled"] * first
    finally:
        here.stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_rank_that_is_saying_why_is_not_interrupted():
    store, said, left = Store(), [], []
    here = Watch(store, 0, 2, said.append, beat=60.0, leave=left.append)
    assert here.speaks()
    here.start()
    os.kill(os.getpid(), signal.SIGTERM)
    here._thread.join(timeout=30)
    here.stop()
    assert (said, left) == ([], [])
