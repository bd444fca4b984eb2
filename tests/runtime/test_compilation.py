"""`torch.compile(fullgraph=True)` through inductor: the plain model, the same with our operators, the packed network.

One layer, so that it is quick, with both forms of shortcuts: a dense one from 40 columns to 36, a compact one to 44.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from support.sliced_models import network, sliced
from support.tiny_models import relative_error, tiny_model, token_ids
from transformers import StaticCache

from slicegpt.modeling import CACHE, CompactShortcut
from slicegpt.runtime import fuse_layers, pack
from slicegpt.runtime.cache import GrowingStep, KVCache, StaticStep
from slicegpt.runtime.executor import Executor

BATCH, PROMPT, CAPACITY = 2, 8, 16
IDS = token_ids(BATCH, PROMPT + 1)
POSITIONS = torch.arange(PROMPT + 1).expand(BATCH, -1)
# In float32 each of some 20 operations in a row rounds by 6e-8 relative, and inductor sums in another order: both are
# off by 5e-7 of the logits here. A wrong term would be off by a tenth.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def inductor():
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    # Workers would take longer to start than these few kernels to compile.
    with torch._inductor.config.patch(compile_threads=1), torch.no_grad():
        yield


@pytest.fixture
def model():
    """The plain model, and its logits [batch, tokens, vocabulary] in float64."""
    torch._dynamo.reset()
    dense = tiny_model("llama", torch.float32, num_hidden_layers=1)
    plain = sliced(dense, dtype=torch.float32, widths=[40, 36, 44])[0]
    layer = plain.model.layers[0]
    assert isinstance(layer.attention_shortcut, torch.nn.Linear)
    assert isinstance(layer.mlp_shortcut, CompactShortcut)
    assert len(layer.mlp_shortcut.factor)
    exact = type(plain)(plain.config).double()
    exact.load_state_dict(plain.state_dict())
    return SimpleNamespace(plain=plain, expected=exact.eval()(IDS).logits)


@pytest.mark.parametrize("form", ["plain", "with our operators"])
def test_model_compiles_without_graph_breaks(model, form):
    """Prefill of a prompt into transformers' static cache, and a token after it."""
    plain = model.plain if form == "plain" else fuse_layers(model.plain)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    cache = StaticCache(config=plain.config, max_cache_len=CAPACITY)
    prompt = compiled(IDS[:, :PROMPT], **{CACHE: cache}).logits
    token = compiled(IDS[:, PROMPT:], position_ids=POSITIONS[:, PROMPT:], **{CACHE: cache}).logits
    assert relative_error(prompt, model.expected[:, :PROMPT]) < TOLERANCE
    assert relative_error(token, model.expected[:, PROMPT:]) < TOLERANCE
    assert relative_error(plain(IDS).logits, model.expected) < TOLERANCE  # eager, the same model


def test_packed_network_compiles_without_graph_breaks(model):
    """The runtime's passes from token ids to logits, attention and cache included: prefill, and a token after it."""
    packed = pack(model.plain)
    fused = Executor(packed, through_operators=True)
    cache = KVCache.allocate(model.plain.config, BATCH, CAPACITY, packed.dtype, packed.device)

    def logits(ids, positions, step):
        return fused.logits(*fused.blocks(fused.embed(ids, positions), step)).unflatten(0, ids.shape)

    @torch.compile(fullgraph=True, dynamic=False)
    def prefill(ids, positions):
        return logits(ids, positions, GrowingStep(cache, PROMPT, fused.angles(positions), 0, False))

    @torch.compile(fullgraph=True, dynamic=False)
    def decode(ids, positions, slot):
        return logits(ids, positions, StaticStep(cache, fused.angles(positions), slot))

    prompt = prefill(IDS[:, :PROMPT], POSITIONS[:, :PROMPT])
    token = decode(IDS[:, PROMPT:], POSITIONS[:, PROMPT:], torch.tensor([PROMPT]))
    assert relative_error(prompt, model.expected[:, :PROMPT]) < TOLERANCE
    assert relative_error(token, model.expected[:, PROMPT:]) < TOLERANCE


@pytest.mark.parametrize("case", ["opt", "phi"])
def test_other_blocks_trace_without_graph_breaks(case):
    """Biases and learned positions, parallel blocks: traced, not compiled, in float64."""
    torch._dynamo.reset()
    plain, ids = network(case, "compact"), token_ids()
    expected = plain(ids).logits
    compiled = torch.compile(fuse_layers(plain), fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(ids, use_cache=False).logits, expected) < 1e-12
