"""A session computes only what a prompt does not share with the last one, and gives the tokens of the whole prompt."""

from itertools import islice

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.errors import SliceGPTError
from slicegpt.ops.cpu import extension
from slicegpt.runtime import Runtime, Sampling

FIRST = [[5, 17, 3, 40, 8, 22, 9]]


@pytest.fixture(params=["growing", "fused", "static"])
def runtime(request):
    if request.param == "fused" and extension.why_not() is not None:
        pytest.skip(str(extension.why_not()))
    return Runtime(tiny_model("llama", torch.float32), max_length=64, prefill_chunk=3, decoder=request.param)


@pytest.fixture
def computed(runtime, monkeypatch):
    """Tokens that were run through the network, pass by pass; float32 and greedy, so that tokens can be compared."""
    seen, embed = [], runtime.executor.embed

    def watched(ids, positions):
        seen.append(ids.shape[1])
        return embed(ids, positions)

    monkeypatch.setattr(runtime.executor, "embed", watched)
    return seen


def whole(runtime, prompt: list[list[int]], count: int) -> list[int]:
    """The reference: the prompt computed from its first token on, on another cache."""
    ids = torch.tensor(prompt)
    return runtime.generate(ids, max_new_tokens=count)[0, ids.shape[1] :].tolist()


def test_a_longer_prompt_computes_what_is_new(runtime, computed):
    with runtime.session(64) as session:
        answer = list(session.stream(torch.tensor(FIRST), 5))
        second = [[*FIRST[0], *answer, 30, 31, 32, 33]]
        computed.clear()
        again = list(session.stream(torch.tensor(second), 4))
        # The last token of an answer was chosen and not run: with the four new ones, in chunks of three; then three
        # steps.
        assert computed == [3, 2, 1, 1, 1]
    assert answer == whole(runtime, FIRST, 5)
    assert again == whole(runtime, second, 4)


def test_another_prompt_keeps_what_is_in_common(runtime, computed):
    with runtime.session(64) as session:
        list(session.stream(torch.tensor(FIRST), 5))
        changed = [[*FIRST[0][:4], 60, 61]]
        computed.clear()
        assert list(session.stream(torch.tensor(changed), 3)) == whole(runtime, changed, 3)
        assert computed[0] == 2
        computed.clear()
        same = list(session.stream(torch.tensor(changed), 3))
        assert computed[0] == 1  # its last token, for the logits
        assert same == whole(runtime, changed, 3)
        other = [[70, 71, 72]]
        assert list(session.stream(torch.tensor(other), 3)) == whole(runtime, other, 3)


def test_an_answer_that_was_stopped_can_be_continued(runtime):
    with runtime.session(64) as session:
        stream = session.stream(torch.tensor(FIRST), 20)
        begun = list(islice(stream, 3))
        stream.close()
        second = [[*FIRST[0], *begun, 44]]
        assert list(session.stream(torch.tensor(second), 4)) == whole(runtime, second, 4)


def test_draws_follow_the_seed(runtime):
    with runtime.session(64, Sampling(True, 5.0)) as session:
        draws = [list(session.stream(torch.tensor(FIRST), 6, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_end_of_sequence_ends_it(runtime):
    answer = whole(runtime, FIRST, 5)
    runtime.stop_ids = (answer[2],)
    with runtime.session(64) as session:
        assert list(session.stream(torch.tensor(FIRST), 5)) == answer[: answer.index(answer[2]) + 1]


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        (FIRST, 60, "max_new_tokens: 7 tokens and 60 new ones exceed"),
        (FIRST, 0, "max_new_tokens: must be at least 1, got 0"),
        ([[1], [2]], 2, r"input_ids: must be one row, got \[2, 1\]"),
        ([[1000]], 2, r"input_ids: must lie in \[0, 96\), got 1000 to 1000"),
    ],
)
def test_bad_input(runtime, ids, count, message):
    with runtime.session(64) as session, pytest.raises(SliceGPTError, match=message):
        session.stream(torch.tensor(ids), count)
