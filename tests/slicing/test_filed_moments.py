"""Moments that are added up in files: the same sums in less memory, and the same sliced model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ridge_regression import SUMS, problem
from support.sliced_models import batches
from support.tiny_models import relative_error, tiny_model, token_ids

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import Linear, canonical_fields, checkpoint_of, source_of
from slicegpt.hardware import scratch
from slicegpt.slicing import SlicingOptions, filed_moments, matrices, refit, slice_model, slicer
from slicegpt.slicing.blocks import blocks_of, dense_block, dense_writers
from slicegpt.slicing.filed_moments import FiledMoments, batch_bytes, moments_for, needs_files
from slicegpt.slicing.moments import Moments

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 5, 100], ids=lambda rows: f"panels of {rows}")
def panel_rows(request, monkeypatch):
    """Rows of a panel of the Gram matrix of 12 inputs."""
    monkeypatch.setattr(matrices, "PANEL_BYTES", 8 * 12 * request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_sums_are_those_of_memory(dtype, panel_rows, tmp_path):
    activations, target = (states.to(dtype) for states in problem(200))
    weight = (1 + torch.arange(200) % 3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    ample, filed = Moments([12], 7, CPU), FiledMoments([12], 7, CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []  # the files have no names
    for rows in torch.arange(200).split(70):
        for moments in (ample, filed):
            moments.add(activations[rows], target[rows], weight[rows])
        gram, cross = filed.rows(slice(0, 12))  # what is added later counts as well
    assert torch.equal(gram, gram.mT)
    assert torch.equal(filed.diagonal(), gram.diagonal())
    picked = torch.tensor([2, 3, 11])
    assert all(map(torch.equal, filed.rows(picked), (gram[picked], cross[picked])))
    assert filed.is_finite()
    weighted = weight.double()[:, None] * activations.double()
    for name, right, found in (("gram", activations, gram), ("cross", target, cross)):
        exact, magnitudes = weighted.mT @ right.double(), weighted.mT.abs() @ right.double().abs()
        # Sums of 200 tokens, in float32 beyond float64, whose order only the product's shape decides.
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        assert ((found - getattr(ample, name)).abs() <= 2 * 201 * unit * magnitudes).all()
        if dtype != torch.float32:  # which some processors multiply in bfloat16
            assert ((found - exact).abs() <= 2 * 201 * unit * magnitudes).all()
    for name in SUMS[2:]:
        assert torch.equal(getattr(filed, name), getattr(ample, name))


def test_infinities_are_seen(panel_rows):
    activations, target = problem(20)
    activations[3, 7] = torch.inf
    filed = FiledMoments([12], 7, CPU)
    filed.add(activations, target)
    assert not filed.is_finite()


def test_files_only_where_memory_is_short(monkeypatch):
    beside = batch_bytes(tokens=64, fitted_tokens=256, rows=24, own=12, inputs=12, width=7, item=4)
    # Four batches joined and copied in one piece, and in float32, bfloat16 and panels.
    assert beside == 2 * 256 * 19 * 4 + 256 * 12 * 4 + 2 * 256 * 19 + 2 * 4096 * 12
    enough = 8 * 12 * (12 + 7) + beside
    assert not needs_files(12, 7, beside, enough)
    free, tells = enough, True
    monkeypatch.setattr(filed_moments, "free_memory", lambda device: free)
    monkeypatch.setattr(filed_moments, "tells", lambda device: tells)
    assert type(moments_for([12], 7, CPU, beside)) is Moments
    free -= 1
    assert type(moments_for([12], 7, CPU, beside)) is FiledMoments
    tells = False
    assert type(moments_for([12], 7, CPU, beside)) is Moments


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "opt", "phi"])
def test_short_of_memory_the_sliced_model_is_the_same(case, monkeypatch, tmp_path):
    """Moments of the allocation and of the fits in files, and input weights beside them."""
    model, ids = tiny_model(case), token_ids()
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 40), Shape(neurons=0.25))
    options = SlicingOptions(dtype=torch.float64, refit=True, fitted=1.0, neuron_multiple=8, scratch=tmp_path)
    ample, report = slice_model(model, config, batches(), options)
    made, filed = [], []

    class Counted(FiledMoments):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    def counted_readers(states, *arguments):
        filed.append(list(states))
        file_readers(states, *arguments)

    file_readers = slicer.file_readers
    monkeypatch.setattr(filed_moments, "FiledMoments", Counted)
    monkeypatch.setattr(slicer, "file_readers", counted_readers)
    for module in (filed_moments, refit):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)
    short, again = slice_model(model, config, batches(), options)
    assert len(made) == len(blocks_of(config)) + config.num_hidden_layers
    assert filed == [list(block.parts) for block in blocks_of(config)]
    assert short.config.neurons == ample.config.neurons
    assert again.tokens == report.tokens
    # As tests/slicing/test_ranks.py derives it for other orders of sums: far below 1e-6 here.
    assert relative_error(short(ids).logits, ample(ids).logits) < 1e-7
    assert list(tmp_path.iterdir()) == []


def test_output_weights_are_copied_only_where_they_have_to_be():
    model = tiny_model("llama")
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 40), Shape())
    block = blocks_of(config)[1]
    layer = checkpoint_of(source_of(model)).layer(0)
    plain = torch.empty(layer.down.weight.shape, dtype=layer.down.weight.dtype).copy_(layer.down.weight)
    turned = plain.mT.contiguous().mT
    for weight, shared in ((plain, True), (turned, False)):
        writers = {"mlp": Linear(weight)}
        lifted = dense_block(config, block, layer, writers, weight.dtype, CPU)
        assert torch.equal(lifted.weight, weight)
        assert (lifted.weight.data_ptr() == weight.data_ptr()) == shared
        assert lifted.weight.is_contiguous()
    assert dense_writers(config, block, layer, CPU)["mlp"].weight.dtype == plain.dtype


PEAK = """
import json, sys, torch
from slicegpt.bench.harness.memory import bytes_in_use, peak_bytes, release_unused_memory, start_peak
from slicegpt.hardware import scratch
from slicegpt.slicing import matrices
from slicegpt.slicing.filed_moments import FiledMoments
from slicegpt.slicing.moments import Moments

size, width = int(sys.argv[1]), 64
matrices.PANEL_BYTES, scratch.PIECE_BYTES = 1 << 20, 1 << 20
cpu = torch.device("cpu")
def peak(make):
    release_unused_memory(cpu)
    start = bytes_in_use(cpu)
    start_peak(cpu)
    moments = make()
    size = moments.size
    activations, target = torch.randn(256, size), torch.randn(256, width)
    for _ in range(2):
        moments.add(activations, target)
    assert moments.is_finite() and moments.diagonal().min() > 0
    return (peak_bytes(cpu) - start) / (8 * size * size)
# Threads, their buffers and code are there before anything is measured.
for count in (256, size):
    files = peak(lambda: FiledMoments([count], width, cpu, sys.argv[2]))
    memory = peak(lambda: Moments([count], width, cpu))
print(json.dumps([files, memory]))
"""


def test_what_is_in_memory(tmp_path):
    """2048 inputs: panels of 1 MB and the pages of one, or a matrix [K, K] of 34 MB; beside either, 256 tokens in
    float32, in bfloat16 and packed, and masks of what is finite: a third of a matrix at most."""
    command = [sys.executable, "-c", PEAK, "2048", str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    files, memory = json.loads(result.stdout)
    if not memory:
        pytest.skip("this system does not tell a process's peak")
    assert files < 0.5
    assert 0.95 < memory < 1.5


def test_a_full_disk_is_one_line(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.os, "posix_fallocate", full, raising=False)
    with pytest.raises(SliceGPTError, match=r"^scratch: a temporary file needs"):
        FiledMoments([12], 7, CPU)
