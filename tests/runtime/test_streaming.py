"""`Runtime.generate(streamer=...)` and `Runtime.stream`: tokens one by one, as transformers hands them out."""

import pytest
import torch
from support.sliced_models import LENGTHS, network
from support.tiny_models import left_padding, tiny_model, token_ids
from transformers import TextStreamer
from transformers.generation import BaseStreamer

from slicegpt.runtime import Runtime


class Recorder(BaseStreamer):
    """Keeps what it is told, beside what `steps` held by then; one `end`, the last call."""

    def __init__(self, steps: list | None = None):
        self.told: list[torch.Tensor] = []
        self.made: list[int] = []
        self.steps = [] if steps is None else steps
        self.ended = False

    def put(self, value):
        assert not self.ended
        assert value.device.type == "cpu"
        self.told.append(value.clone())
        self.made.append(len(self.steps))

    def end(self):
        assert not self.ended
        self.ended = True


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_told_what_transformers_tells(rows):
    """The prompt first, then a token [batch] at a time, padding of finished rows included, and the end."""
    plain = network("llama", "compact", torch.float32)
    ids, mask = (part[:rows] for part in left_padding(token_ids(), LENGTHS))
    free = plain.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    plain.generation_config.eos_token_id = [free[0, 15].item()]  # the fourth new token of the first row
    plain.generation_config.pad_token_id = 0
    theirs, ours, runtime = Recorder(), Recorder(), Runtime(plain)
    expected = plain.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, streamer=theirs)
    assert torch.equal(runtime.generate(ids, mask, 9, streamer=ours), expected)
    assert theirs.ended
    assert ours.ended
    assert all(torch.equal(*pair) for pair in zip(ours.told, theirs.told, strict=True))
    assert all(torch.equal(*pair) for pair in zip(runtime.stream(ids, mask, 9), expected.T[12:], strict=True))


def count_steps(runtime: Runtime) -> list:
    """A list that grows by one with every step of the runtime's decoders."""
    steps, make = [], runtime.new_decoder

    def new_decoder(*arguments):
        decoder = make(*arguments)
        step = decoder.step
        decoder.step = lambda: steps.append(None) or step()
        return decoder

    runtime.new_decoder = new_decoder
    return steps


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["auto", "growing", "static"])
def test_tokens_arrive_before_the_next_is_computed(decoder):
    """The prompt ahead of everything, the first token after the prefill, token n after n - 1 steps."""
    runtime = Runtime(network("llama", "compact", torch.float32), decoder=decoder)
    steps = count_steps(runtime)
    streamer = Recorder(steps)
    runtime.generate(token_ids(1), max_new_tokens=6, ignore_eos=True, streamer=streamer)
    assert streamer.made == [0, 0, 1, 2, 3, 4, 5]
    steps.clear()
    made = [len(steps) for _ in runtime.stream(token_ids(1), max_new_tokens=6, ignore_eos=True)]
    assert made == [0, 1, 2, 3, 4, 5]


@torch.no_grad()
def test_text_streamers(tiny_tokenizer, capsys):
    """They skip the prompt where they are told to, and take one sequence, as with transformers' `generate`."""
    plain, ids = tiny_model("llama", torch.float32, vocab_size=512), token_ids(2)
    runtime, ids = Runtime(plain), ids + 100  # letters, not control characters
    for skip in (True, False):
        printed = []
        for generate in (plain.generate, runtime.generate):
            generate(ids[:1], max_new_tokens=8, streamer=TextStreamer(tiny_tokenizer, skip_prompt=skip))
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        assert (tiny_tokenizer.decode(ids[0]) in printed[1]) is not skip
    steps = count_steps(runtime)
    for generate in (plain.generate, runtime.generate):
        with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
            generate(ids, max_new_tokens=8, streamer=TextStreamer(tiny_tokenizer))
    assert not steps
