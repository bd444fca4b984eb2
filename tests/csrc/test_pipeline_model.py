"""The pipelines of the wgmma kernels: no order of their asynchronous parts goes wrong, every planted mistake is found.

The emulation runs one order of many; this model (tests/support/pipeline_model.py) walks over all of them.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from support.pipeline_model import Pipeline, Violation, check

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Two warps where a block is alone; for a pair one of each, or the states are too many for a test.
ALONE = Pipeline()
PAIR = Pipeline(blocks=2, warps=1, rounds=5, columns=False)

# rotate_wgmma.cu: tiles one after another, longer than the stages are many, of one step, and of as many.
TILES = replace(ALONE, tile=3)
TILE_PAIR = replace(PAIR, tile=3, rounds=6)

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
    "a tile's last stage given back too early": (replace(TILES, tile_waits=False), "overwrites stage"),
    "a tile's last stage kept": (replace(TILES, tile_gives_back=False), "deadlock"),
    "a pair's tiles without the last barrier": (replace(TILE_PAIR, final_sync=False), "has ended"),
    "a pair without the last barrier": (replace(PAIR, final_sync=False), "has ended"),
}


@pytest.mark.parametrize(
    "facts",
    [
        ALONE,
        replace(ALONE, stages=3, rounds=7),
        replace(ALONE, rounds=1),
        PAIR,
        replace(PAIR, rounds=1),
        TILES,
        replace(TILES, tile=1),
        replace(TILES, tile=2, stages=3),
        TILE_PAIR,
    ],
    ids=[
        "one block",
        "three stages",
        "one round",
        "a pair",
        "a pair, one round",
        "tiles",
        "tiles of one step",
        "tiles, three stages",
        "a pair's tiles",
    ],
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


FACTS = {
    "residue_wgmma.cu": [
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
    ]
}
FACTS["rotate_wgmma.cu"] = [
    *FACTS["residue_wgmma.cu"],
    "if (!first) give_back<kBlocks>(&barriers.empty[(it - 1) % kStages]);",
    # The end of a tile.
    "    ptx::wgmma_wait<0>(sums);\n    give_back<kBlocks>(&barriers.empty[(it - 1) % kStages]);",
]


@pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree")
@pytest.mark.parametrize("source", FACTS)
def test_the_model_is_of_this_kernel(source):
    """The lines that the model was made from are there: who changes one must look at the model."""
    text = (CSRC / source).read_text()
    assert [fact for fact in FACTS[source] if fact not in text] == []
