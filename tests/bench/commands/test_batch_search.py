"""The search for the best batch, on invented machines whose best batch is known."""

import pytest

from slicegpt.bench.commands.batch_search import BatchSearch, BatchTooLarge, finer, search_batches


class Machine:
    """tokens/s = rate(batch), memory for `fits` sequences; keeps what it was asked."""

    def __init__(self, rate, fits: int = 1 << 30):
        self.rate, self.fits = rate, fits
        self.asked: list[int] = []

    def __call__(self, batch: int) -> float:
        self.asked.append(batch)
        if batch > self.fits:
            raise BatchTooLarge(f"out of memory at batch {batch}")
        return float(self.rate(batch))


def test_doubles_until_memory_is_exhausted_then_looks_between():
    machine = Machine(lambda batch: batch, fits=45)
    found = search_batches(machine)
    assert machine.asked == [1, 2, 4, 8, 16, 32, 64, 24, 40, 48]
    assert (found.stop, found.best) == ("memory", 40)
    assert found.reason == "out of memory at batch 48"
    assert max(found.rates) == 40


def test_stops_at_a_drop_that_shows_twice():
    machine = Machine(lambda batch: batch if batch <= 16 else 8)
    found = search_batches(machine)
    # 32 drops, and 64 does; each is measured again, with 16; then the quarters around 16.
    assert machine.asked == [1, 2, 4, 8, 16, 32, 16, 32, 64, 16, 64, 12, 20, 24, 28]
    assert (found.stop, found.best) == ("drop", 16)
    assert "from 16 to 8 tokens/s at batch 32" in found.reason


def test_finer_steps_find_what_doubling_misses():
    found = search_batches(Machine(lambda batch: min(batch, 24) - max(0, batch - 24) / 2))
    assert found.best == 24


def test_a_drop_that_was_noise_does_not_end_the_search():
    slow_once = {8}

    def rate(batch):
        if batch in slow_once:
            slow_once.discard(batch)
            return batch / 4
        return batch

    found = search_batches(Machine(rate, fits=16))
    assert found.stop == "memory"
    assert found.rates[8] == 8


def test_a_batch_that_is_slow_by_itself_does_not_end_the_search():
    found = search_batches(Machine(lambda batch: batch if batch != 8 else 3, fits=64))
    assert (found.stop, found.best) == ("memory", 64)
    assert found.rates[8] == 3


def test_a_drop_before_the_limit_is_the_reason():
    machine = Machine(lambda batch: batch if batch <= 16 else 8, fits=40)
    assert (search_batches(machine).stop, max(machine.asked)) == ("drop", 64)
    assert search_batches(Machine(machine.rate), most=32).stop == "drop"


def test_a_lucky_best_does_not_make_the_next_batch_a_drop():
    lucky = {8}

    def rate(batch):
        if batch in lucky:
            lucky.discard(batch)
            return 100
        return batch

    assert search_batches(Machine(rate, fits=16)).stop == "memory"


def test_plateau_ends_it():
    machine = Machine(lambda batch: min(batch, 16))
    found = search_batches(machine)
    assert (found.stop, max(machine.asked)) == ("plateau", 64)
    assert found.reason == "two doublings up to batch 64 gained less than 2%"


def test_slow_growth_beyond_the_tolerance_goes_on():
    found = search_batches(Machine(lambda batch: 1.05 ** batch.bit_length()), most=256)
    assert (found.stop, found.reason, found.best) == ("limit", "batch limit of 256", 256)


def test_nothing_fits():
    found = search_batches(Machine(lambda batch: batch, fits=0))
    assert (found.stop, found.rates) == ("memory", {})


def test_what_was_found_survives_an_interruption():
    def measure(batch):
        if batch == 8:
            raise KeyboardInterrupt
        return batch

    found = BatchSearch()
    with pytest.raises(KeyboardInterrupt):
        search_batches(measure, found=found)
    assert found.rates == {1: 1, 2: 2, 4: 4}
    assert found.best == 4


@pytest.mark.parametrize(("best", "batches"), [(1, []), (2, [3]), (4, [3, 5, 6, 7]), (64, [48, 80, 96, 112])])
def test_finer_batches(best, batches):
    assert finer(best) == batches
