"""The runtime against the plain network: every family, dense and sliced, logits and tokens."""

import pytest
import torch
from support.sliced_models import CASE_FORMS, FORMS, LENGTHS, network
from support.tiny_models import (
    CASES,
    FUSED_CASES,
    NORMS_BEHIND,
    in_float64,
    left_padding,
    own_positions,
    relative_error,
    tiny_model,
    token_ids,
)

from slicegpt.errors import SliceGPTError
from slicegpt.modeling import CompactShortcut, SlicedConfig
from slicegpt.modeling.random_weights import random_model
from slicegpt.runtime import Runtime, Sampling, attention, packed, to_canonical
from slicegpt.runtime.executor import Executor


@torch.no_grad()
@pytest.mark.parametrize(("case", "form"), CASE_FORMS)
def test_logits_are_those_of_the_plain_model(case, form):
    """Float64: some hundred roundings of 1e-16. Padding shifts positions: the angles of rotary positions, computed in
    float32, then differ by roundings of up to 12 radians (7e-7), which the scores see."""
    plain, ids = network(case, form), token_ids()
    runtime = Runtime(plain, prefill_chunk=5)
    assert relative_error(runtime.logits(ids), plain(ids).logits) < 1e-12
    ids, mask = left_padding(ids, LENGTHS)
    expected = plain(ids, attention_mask=mask, **own_positions(plain, mask)).logits
    actual = runtime.logits(ids, mask)
    tolerance = 1e-12 if case.startswith(("opt", "gpt2")) else 1e-6
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("form", ["dense", "compact"])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt", "qwen3-tied"])
def test_attention_as_a_gpu_takes_it(case, form, monkeypatch):
    """Grouped heads, masks and chunks the way PyTorch's GPU kernels want them; float64, as above."""
    monkeypatch.setattr(attention, "_on_gpu", lambda tensor: True)
    plain, ids = network(case, form), token_ids()
    runtime = Runtime(plain, prefill_chunk=5)
    assert relative_error(runtime.logits(ids), plain(ids).logits) < 1e-12
    ids, mask = left_padding(ids, LENGTHS)
    actual, expected = runtime.logits(ids, mask), plain(ids, attention_mask=mask).logits
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < (1e-12 if case == "opt" else 1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("case", "form"), CASE_FORMS)
def test_greedy_tokens_are_those_of_the_plain_model_in_float32(case, form):
    plain = network(case, form, torch.float32)
    ids, mask = left_padding(token_ids(), LENGTHS)
    expected = plain.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for decoder in ("auto", "growing", "static"):  # "static" is what a CUDA graph captures
        runtime = Runtime(plain, prefill_chunk=5, decoder=decoder)
        assert torch.equal(runtime.generate(ids, mask, 12), expected)
    one = plain.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(runtime.generate(ids[:1], max_new_tokens=12), one)


@torch.inference_mode()
@pytest.mark.parametrize("case", FUSED_CASES)
def test_generation_begins_with_the_logits_of_the_last_position(case):
    """A few short rows, whose sums of squares come from the kernels: the head reads every n-th of them."""
    form = "neurons" if case in NORMS_BEHIND else "compact"
    runtime, ids = Runtime(network(case, form, torch.float32)), token_ids(3, 4)
    last = runtime._last_logits(ids, None, runtime.new_cache(3, 8))
    assert relative_error(last, runtime.logits(ids)[:, -1]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "opt", "phi", "qwen3-tied"])
def test_half_precision_errs_no_more_than_twice_the_plain_model(case, dtype):
    """Both round to 16 bits at every step; against the same weights in float64."""
    plain, ids = network(case, "compact", dtype), token_ids(4, 24)
    exact = type(plain)(plain.config).double()
    exact.load_state_dict(plain.state_dict())
    expected = exact.eval()(ids).logits
    error = relative_error(Runtime(plain).logits(ids), expected)
    assert error < 2 * relative_error(plain(ids).logits, expected)
    # one row after another, through the matrix-vector forms
    runtime = Runtime(plain)
    steps = torch.cat([runtime.logits(ids[:1, : n + 1])[:, -1:] for n in range(3)], dim=1)
    assert relative_error(steps, expected[:1, :3]) < 3 * relative_error(
        plain(ids[:1, :3]).logits, expected[:1, :3]
    )


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt"])
def test_through_the_registered_operators(monkeypatch, case):
    plain, ids = network(case, "varying"), token_ids()
    expected = plain(ids).logits
    for backend in ("auto", "reference"):
        monkeypatch.setenv("SLICEGPT_BACKEND", backend)
        runtime = Runtime(plain)
        runtime.executor = Executor(runtime.executor.packed, through_operators=True)
        assert relative_error(runtime.logits(ids), expected) < 1e-12


# --- generation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_end_at_their_stop_token_and_get_padding():
    plain = network("llama", "compact", torch.float32)
    ids, mask = left_padding(token_ids(), LENGTHS)
    free = plain.generate(
        ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
    )
    stop = free[0, 15].item()  # the fourth new token of the first row
    plain.generation_config.eos_token_id = [stop, 2]
    plain.generation_config.pad_token_id = 0
    expected = plain.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    runtime = Runtime(plain)
    actual = runtime.generate(ids, mask, 16)
    assert torch.equal(actual, expected)
    assert (actual[0, 12:] == stop).sum() == 1
    assert (actual[0, 16:] == 0).all()
    assert torch.equal(runtime.generate(ids, mask, 16, ignore_eos=True)[0, 12:16], free[0, 12:16])
    # everything ends: so does the stream
    assert len(list(runtime.stream(ids[:1], mask[:1], 40))) == 4


@torch.no_grad()
def test_calls_do_not_see_each_other():
    runtime = Runtime(network("mistral-window", "compact", torch.float32))
    ids, mask = left_padding(token_ids(), LENGTHS)
    first = runtime.generate(ids, mask, 12)
    runtime.generate(token_ids(3, 20, seed=1), max_new_tokens=30)  # unpadded, longer, same cache
    runtime.generate(ids[:2], mask[:2], 5)  # another cache
    assert torch.equal(runtime.generate(ids, mask, 12), first)
    assert torch.equal(torch.stack(list(runtime.stream(ids, mask, 12)), dim=1), first[:, 12:])


@torch.no_grad()
def test_a_cache_that_grows():
    plain = network("llama", "dense", torch.float32)
    runtime = Runtime(plain, max_length=400)
    ids = token_ids(1, 20)
    runtime.generate(ids, max_new_tokens=4)
    expected = plain.generate(ids, max_new_tokens=300, min_new_tokens=300, do_sample=False, pad_token_id=0)
    assert torch.equal(runtime.generate(ids, max_new_tokens=300, ignore_eos=True), expected)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["growing", "static"])
def test_draws_follow_the_seed(decoder):
    runtime = Runtime(network("llama", "compact", torch.float32), decoder=decoder)
    sampling = Sampling(do_sample=True, temperature=2.0, top_k=30, top_p=0.9)
    arguments = {"max_new_tokens": 20, "sampling": sampling, "ignore_eos": True}
    first, again, other = (runtime.generate(token_ids(), seed=seed, **arguments) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- packing ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", FUSED_CASES)
def test_canonical_form_of_a_dense_model(case):
    model, ids = tiny_model(case), token_ids()
    canonical = to_canonical(model)
    assert set(canonical.config.shortcuts) == {"identity"}
    assert relative_error(canonical(ids).logits, model(ids).logits) < 1e-12
    assert to_canonical(canonical) is canonical


def test_bytes_a_token_reads():
    """Width 48 to 36 in three layers, two of four heads for keys; counted by hand."""
    runtime = Runtime(network("llama", "compact", torch.float32))
    attention = (48 + 2 * 24) * 36 + 36 * 48  # v, k, q and o
    mlp = 3 * 80 * 36
    factors = 2 * 2 * 12 * 36  # both copies of F, of attention's shortcut and the MLP's
    # The last boundary is 48 wide: nothing of its shortcut is left but 12 more rows of down_proj.
    layers = 3 * (attention + mlp + factors) - 2 * 12 * 36 + 12 * 80
    assert runtime.bytes_per_token() == 4 * (layers + 36 + 96 * 48)  # a row of the embedding, and the head


def test_stored_bytes():
    """Of a sliced model, an untied head beside its embedding, and both copies of every factor; a tied head once."""
    for case in ("llama", "llama-tied", "opt-untied"):
        plain = network(case, "compact", torch.float32)
        expected = sum(parameter.numel() for parameter in plain.parameters())
        for shortcut in compact_shortcuts(plain):
            rank, width = shortcut.factor.shape
            expected += rank * (width + shortcut.padding)  # rows of zeros where the next boundary is wider
        assert Runtime(plain).executor.packed.stored_bytes() == 4 * expected


def compact_shortcuts(plain):
    return [module for module in plain.modules() if isinstance(module, CompactShortcut)]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_rotate_add_is_told_where_norm_linear_reads_the_factor(case, form):
    """A view of its last rows, the very numbers that `rotate_add`'s weight holds; the tokens are the same without."""
    plain = network(case, form, torch.float32)
    runtime, ids = Runtime(plain, decoder="static"), token_ids()
    runtime.executor = Executor(runtime.executor.packed, through_operators=True)
    calls, rotate_add = [], runtime.executor.rotate_add

    def spy(*arguments):
        calls.append(arguments)
        return rotate_add(*arguments)

    runtime.executor.rotate_add = spy
    tokens = runtime.generate(ids, max_new_tokens=6, ignore_eos=True)
    runtime.executor.rotate_add = lambda *arguments: rotate_add(*arguments[:5])
    assert torch.equal(runtime.generate(ids, max_new_tokens=6, ignore_eos=True), tokens)

    blocks, ranks = runtime.executor.packed.blocks, []
    for (a, weight, h, _, _, factor), block in zip(calls, blocks * 6, strict=True):
        assert factor is block.factor
        ranks.append(0 if factor is None else len(factor))
        if factor is None:
            continue
        source = block.inputs[-1].weight
        end = source.data_ptr() + source.nbytes
        assert factor.is_contiguous()
        assert factor.shape[1] == h.shape[1]
        assert factor.data_ptr() + factor.nbytes == end
        inner = a.shape[1] - len(factor)
        assert torch.equal(factor, -weight[: h.shape[1], inner:].T)
        assert not weight[h.shape[1] :, inner:].any()
    stored = [len(shortcut.factor) for shortcut in compact_shortcuts(plain)] if form != "dense" else []
    assert sorted(rank for rank in ranks[: len(blocks)] if rank) == sorted(rank for rank in stored if rank)
    assert bool(max(ranks)) == (form in ("compact", "varying", "head"))


def test_bytes_a_token_reads_with_the_second_copy_in_l2(monkeypatch):
    runtime = Runtime(network("llama", "varying", torch.float32))
    monkeypatch.setattr(packed, "reads_factor", lambda weight, factor, rows: rows < 17)
    seconds = [
        len(block.output) * len(block.factor)
        for block in runtime.executor.packed.blocks
        if block.factor is not None
    ]
    assert runtime.bytes_per_token(16) == runtime.bytes_per_token(17) - 4 * sum(seconds)


@torch.no_grad()
def test_released_models_are_not_held_twice():
    plain, ids = network("llama", "compact", torch.float32), token_ids()
    expected = plain(ids).logits
    runtime = Runtime(plain, release=True)
    assert all(parameter.is_meta for parameter in plain.model.layers.parameters())
    assert relative_error(runtime.logits(ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "tanh", "gated_mlp": False}, "model: activation 'tanh' is not supported"),
        ({"hidden_act": "xielu", "gated_mlp": False}, "model: activation 'xielu' is not supported"),
        ({"hidden_act": "relu"}, "model: gated activation 'relu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
    ],
)
def test_what_is_not_supported_says_so(changes, message):
    config = {"vocab_size": 96, "dense_hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(SliceGPTError, match=message):
        Runtime(random_model(SlicedConfig(**(config | rope | changes)), torch.float32))


@pytest.fixture(scope="module")
def small():
    return Runtime(network("opt", "dense", torch.float32))


@pytest.mark.parametrize(
    ("ids", "mask", "new", "message"),
    [
        (
            torch.zeros(3, dtype=torch.long),
            None,
            1,
            r"input_ids: must be integers \[batch, tokens\], .*got \[3\]",
        ),
        (torch.zeros(1, 0, dtype=torch.long), None, 1, r"at least one, got \[1, 0\]"),
        (torch.ones(1, 4), None, 1, "input_ids: must be integers .* torch.float32"),
        (torch.full((1, 4), 96), None, 1, r"input_ids: must lie in \[0, 96\), got 96 to 96"),
        (torch.ones(1, 60, dtype=torch.long), None, 5, "60 tokens and 5 new ones exceed max_length 64"),
        (torch.ones(1, 4, dtype=torch.long), None, 0, "max_new_tokens: must be at least 1, got 0"),
        (
            torch.ones(1, 4, dtype=torch.long),
            torch.ones(1, 3),
            1,
            r"attention_mask: must be \[1, 4\] .*got \[1, 3\]",
        ),
        (torch.ones(1, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0]]), 1, "padded on the left only"),
    ],
)
def test_errors_name_the_argument(small, ids, mask, new, message):
    with pytest.raises(SliceGPTError, match=message):
        small.generate(ids, mask, new)


def test_errors_of_the_runtime():
    plain = network("opt", "dense", torch.float32)
    for arguments, message in (
        ({"max_length": 100}, "max_length: must be at most 64, the model's learned positions, got 100"),
        ({"prefill_chunk": 0}, "prefill_chunk: must be at least 1, got 0"),
        ({"decoder": "quick"}, "decoder: must be one of auto, growing, fused, static, graph, got 'quick'"),
    ):
        with pytest.raises(SliceGPTError, match=message):
            Runtime(plain, **arguments)


# --- the GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ["llama", "opt", "phi", "mistral-window"])
def test_a_cuda_graph_gives_the_same_tokens(case, dtype):
    plain = network(case, "compact", dtype).cuda()
    ids, mask = left_padding(token_ids(), LENGTHS)
    expected = Runtime(plain, decoder="static").generate(ids, mask, 20)
    runtime = Runtime(plain)
    assert torch.equal(runtime.generate(ids, mask, 20), expected)
    assert torch.equal(runtime.generate(ids, mask, 20), expected)  # the same graph again
    sampling = Sampling(do_sample=True, temperature=2.0)
    draws = [runtime.generate(ids, mask, 20, sampling, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt"])
def test_half_precision_with_heads_that_attention_kernels_take(case, device):
    """Heads of 64 entries, in groups, padded, in chunks, in a window: every kernel of a GPU's, and a captured step.

    Against the same weights in float64: float16 rounds to 5e-4, some hundred times on the way to logits of size 1.
    """
    grouped = {} if case == "opt" else {"num_key_value_heads": 2, "head_dim": 64}
    model_class, config_class, config = CASES[case]
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "initializer_range": 0.04} | grouped
    if case == "opt":
        sizes["word_embed_proj_dim"] = 512
    half = model_class(config_class(**(config | sizes))).half().eval()
    exact = in_float64(model_class(half.config).double().eval())
    exact.load_state_dict(half.state_dict())
    ids, mask = left_padding(token_ids(3, 40), [40, 23, 9])
    runtime = Runtime(half.to(device), prefill_chunk=16)
    for keep in (torch.ones_like(mask), mask):
        new = runtime.generate(ids.to(device), keep.to(device), 12, ignore_eos=True).cpu()
        seen = torch.cat((keep, torch.ones(3, 12, dtype=keep.dtype)), dim=1)
        expected = exact(new, attention_mask=seen).logits
        actual = runtime.logits(new.to(device), seen.to(device)).cpu().double()
        assert relative_error(actual[seen.bool()], expected[seen.bool()]) < 1e-2
        # What was chosen step by step is best, or as good as best.
        scores = expected[:, 39:-1]
        chosen = scores.gather(2, new[:, 40:, None])[..., 0]
        assert (scores.max(dim=2).values - chosen).max() < 2e-2 * scores.abs().max()
