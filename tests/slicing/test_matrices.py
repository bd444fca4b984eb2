"""Factor, solution and inverse in place: against what is known, in one block and in many, and what memory they take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ridge_regression import in_columns, moments_of, prior_of, problem
from support.tiny_models import relative_error

from slicegpt.families import Linear
from slicegpt.slicing import matrices, refit
from slicegpt.slicing.matrices import factorise_, invert_, panels, solve_
from slicegpt.slicing.objective import Objective
from slicegpt.slicing.refit import fit_block


def known_inverse(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric positive definite matrix of condition 1e4 and its inverse, both from eigenvalues that are chosen."""
    generator = torch.Generator().manual_seed(size)
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    values = torch.logspace(-2, 2, size, dtype=torch.float64)
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


@pytest.fixture(params=[None, 16, 7], ids=["one block", "blocks of 16", "blocks of 7"])
def small_blocks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(matrices, "BLOCK", request.param)
        monkeypatch.setattr(matrices, "PANEL_BYTES", 8 * 60 * request.param)
    return request.param


def test_factor_solution_and_inverse(small_blocks):
    """Of a known matrix, each in the memory of what it is made from."""
    size, outputs = 60, 33
    system, inverse = known_inverse(size)
    expected = inverse @ (right := torch.ones(size, outputs).double().cumsum(dim=1))
    place, solution = in_columns(system), in_columns(right)
    addresses = place.data_ptr(), solution.data_ptr()
    assert factorise_(place)
    assert torch.equal(place, place.tril())
    assert relative_error(place @ place.mT, system) < 60 * 2.0**-53  # backward stable: K roundings
    solve_(place, solution)
    invert_(place)
    assert (place.data_ptr(), solution.data_ptr()) == addresses
    # A condition of 1e4 times K roundings.
    assert relative_error(solution, expected) < 1e4 * 60 * 2.0**-53
    assert relative_error(place, inverse) < 1e4 * 60 * 2.0**-53
    assert relative_error(place, place.mT) < 60 * 2.0**-53


def test_solving_in_place_gives_the_bits_of_cholesky_solve():
    """In one panel: what was sliced before stays as it was."""
    system, right = known_inverse(60)[0], torch.randn(60, 5).double()
    place, solution = in_columns(system), in_columns(right)
    assert factorise_(place)
    solve_(place, solution)
    factor = torch.linalg.cholesky(system)
    assert torch.equal(place, factor)
    assert torch.equal(solution, torch.cholesky_solve(right, factor))


def test_an_empty_row_is_one_of_the_identity():
    system = torch.zeros(3, 3).double()
    system[1:, 1:] = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    place, right = in_columns(system), in_columns(torch.tensor([[0.0], [1.0], [1.0]]).double())
    assert factorise_(place)
    solve_(place, right)
    assert relative_error(right, torch.tensor([[0.0], [0.125], [0.25]]).double()) < 8 * 2.0**-53


@pytest.mark.parametrize(
    "system", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]], ids=["indefinite", "singular"]
)
def test_what_has_no_factor(system):
    assert not factorise_(in_columns(torch.tensor(system).double()))


def test_panels_hold_every_row_once(monkeypatch):
    monkeypatch.setattr(matrices, "PANEL_BYTES", 8 * 100)
    assert [(part.start, part.stop) for part in panels(25, 10)] == [(0, 10), (10, 20), (20, 25)]
    assert list(panels(2, 10**6)) == [slice(0, 1), slice(1, 2)]
    assert list(panels(0, 10)) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("neurons", [None, 7])
def test_short_of_memory_the_fit_is_the_same(neurons, bias, small_blocks, monkeypatch, tmp_path):
    """Moments and fits in files and all in small panels: the same weights, but for the order of float64 sums."""
    activations, target = problem(200)
    prior = prior_of(bias=bias)
    writers = {"mlp": Linear(prior.weight.mT, prior.bias)}
    ample = fit_block(Objective(), moments_of(activations, target), writers, (0.1, 0.3, 1.0), neurons)
    monkeypatch.setattr(refit, "free_memory", lambda device: 0)
    short = fit_block(
        Objective(), moments_of(activations, target), writers, (0.1, 0.3, 1.0), neurons, tmp_path
    )
    assert list(tmp_path.iterdir()) == []  # the files have no names
    if neurons is not None:
        assert torch.equal(short.neurons, ample.neurons)
    for ridge, fitted in ample.writers.items():
        # Conditions of some 1e3, times K = 12 roundings.
        assert relative_error(short.writers[ridge]["mlp"].weight, fitted["mlp"].weight) < 1e3 * 12 * 2.0**-53
        assert short.remaining[ridge] == pytest.approx(ample.remaining[ridge], rel=1e-10)


PEAK = """
import json, sys, torch
from slicegpt.bench.harness.memory import bytes_in_use, peak_bytes, release_unused_memory, start_peak
from slicegpt.families import Linear
from slicegpt.hardware import scratch
from slicegpt.slicing import matrices, refit
from slicegpt.slicing.moments import Moments
from slicegpt.slicing.objective import Objective

size, width, short = int(sys.argv[1]), 64, sys.argv[2] == "short"
matrices.BLOCK, matrices.PANEL_BYTES, scratch.PIECE_BYTES = 64, 1 << 20, 1 << 20
refit.free_memory = lambda device: 0 if short else 1 << 60
cpu = torch.device("cpu")
# Threads, their buffers and the code that LAPACK reads are there before anything is measured.
def work(size):
    moments = Moments([size], width, cpu)
    activations, target = torch.randn(256, size), torch.randn(256, width)
    moments.add(activations, target)
    writers = {"mlp": Linear(torch.randn(width, size))}
    del activations, target
    release_unused_memory(cpu)
    start = bytes_in_use(cpu) - moments.gram.nbytes
    start_peak(cpu)
    refit.fit_block(Objective(), moments, writers, (0.1, 0.3), size // 2, sys.argv[3])
    return peak_bytes(cpu) - start
work(256)
print(json.dumps(work(size) / (8 * size * size)))
"""


@pytest.mark.parametrize(("place", "matrices_at_once"), [("ample", 2), ("short", 1)])
def test_at_most_two_matrices_at_a_time(place, matrices_at_once, tmp_path):
    """The choice of neurons and two fits of 2048 inputs: the process's own peak, in matrices [K, K] of 34 MB.

    Beside them: right-hand sides and solutions [K, 64], a thirty-second of a matrix each; panels and what is deleted in
    one of 32 rounds, [32, K] three times; where memory is short, the pages of one panel of the file; and the buffers
    that BLAS packs into. All that is below 0.6 of a matrix; a further copy would be 1.
    """
    command = [sys.executable, "-c", PEAK, "2048", place, str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout)
    if not peak:
        pytest.skip("this system does not tell a process's peak")
    # Where memory is short, the Gram matrix is there until it is in the file, and the system only afterwards.
    assert matrices_at_once - 0.1 < peak < matrices_at_once + 0.6
