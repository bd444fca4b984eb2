"""csrc/residue_wgmma.cu's pipeline: no order of its asynchronous parts goes wrong, and every planted mistake is found.

The emulation runs one order of many; this model (tests/support/pipeline_model.py) walks over all of them.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from support.pipeline_model import Pipeline, Violation, check

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "residue_wgmma.cu"

# Two warps where a block is alone; for a pair one of each, or the states are too many for a test.
ALONE = Pipeline()
PAIR = Pipeline(blocks=2, warps=1, rounds=5, columns=False)

MISTAKES = {
    # What a warp gives back, its own wgmma still reads.
    "given back too early": (replace(ALONE, release=0), "overwrites stage"),
    "nothing waited for": (replace(ALONE, in_flight=2, stages=3, rounds=7), "overwrites stage"),
    "one warp empties a stage": (replace(ALONE, empty_count=1), "overwrites|more arrivals|deadlock"),
    "producer's parity": (replace(ALONE, producer_parity=0), "deadlock"),
    "consumers' parity": (replace(ALONE, consumer_parity=1), "read before it came"),
    "too few bytes announced": (replace(ALONE, expected_parts=1), "read before it came"),
    "too many bytes announced": (replace(ALONE, expected_parts=3), "deadlock"),
    # The other block's warps still read the half that this block's copy overwrites there.
    "the other block is not asked": (replace(PAIR, empty_count=1, remote=False), "overwrites"),
    "the other block is not told": (replace(PAIR, remote=False), "deadlock"),
    # What one block does at the other's barriers before it sees them initialised is lost.
    "no fence of a pair's barriers": (
        replace(PAIR, init_fence=False, rounds=3),
        "before it was initialised .other",
    ),
    "a pair that does not meet first": (
        replace(PAIR, init_sync=False, rounds=3),
        "before it was initialised .other",
    ),
    "no fence for the copies": (replace(ALONE, proxy_fence=False), "before it was initialised .copies"),
    "a pair without the last barrier": (replace(PAIR, final_sync=False), "has ended"),
}


@pytest.mark.parametrize(
    "facts",
    [ALONE, replace(ALONE, stages=3, rounds=7), replace(ALONE, rounds=1), PAIR, replace(PAIR, rounds=1)],
    ids=["one block", "three stages", "one round", "a pair", "a pair, one round"],
)
def test_no_order_goes_wrong(facts):
    assert check(facts) > facts.rounds * facts.warps


def test_copies_may_come_before_their_announcement():
    """In a pair they do: the other block's copy does not wait for this block's announcement."""
    assert check(replace(PAIR, announce_first=False, rounds=3)) > 100


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_found(name):
    facts, message = MISTAKES[name]
    with pytest.raises(Violation, match=message):
        check(facts)


@pytest.mark.skipif(not SOURCE.exists(), reason="needs the source tree")
@pytest.mark.parametrize(
    "fact",
    [
        "mbarrier_try_wait(&barriers.empty[s], (it / kStages & 1) ^ 1)",  # producer_parity 1
        "mbarrier_try_wait(&barriers.full[s], it / kStages & 1)",  # consumer_parity 0
        "mbarrier_init(&barriers.full[s], 1)",
        "mbarrier_init(&barriers.empty[s], kBlocks * kConsumerWarps)",  # empty_count: all that read
        "mbarrier_arrive_expect(full, kStageBytes)",  # expected_parts: all
        "wgmma_wait<1>(sums)",  # in_flight 1
        "barriers.empty[(it - 1) % kStages]",  # release 1
        "if (lane < kBlocks) ptx::mbarrier_arrive_at(empty, lane)",  # remote
        "if constexpr (kBlocks > 1) ptx::cluster_sync();\n#endif",  # final_sync
        "ptx::fence_proxy_async();",  # proxy_fence
        "if constexpr (kBlocks > 1) ptx::fence_mbarrier_init();",  # init_fence
        "    else\n        ptx::cluster_sync();\n\n",  # init_sync
    ],
)
def test_the_model_is_of_this_kernel(fact):
    """The lines that the model was made from are there: who changes one must look at the model."""
    assert fact in SOURCE.read_text()
