"""Several ranks slice as one does: the same sums in another order. Two and three processes over gloo."""

from pathlib import Path

import pytest
import torch
from support import ranks_worker
from support.tiny_models import relative_error
from support.torchrun import torchrun

from slicegpt.errors import SliceGPTError
from slicegpt.hardware.launcher import Launch, launched
from slicegpt.hardware.ranks import Ranks, device_of

U = 2.0**-53


@pytest.fixture(scope="module")
def alone():
    return ranks_worker.slice_together(Ranks())


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    """The number of ranks, and what rank 0 saved."""
    file = tmp_path_factory.mktemp("ranks") / "outcome.pt"
    done = torchrun(request.param, Path(ranks_worker.__file__), file)
    assert done.returncode == 0, done.stderr
    return request.param, torch.load(file)


def tolerance(report, widths: list[int], inner: int) -> float:
    """What another order of float64 sums may change in the weights, relative.

    A sum over T tokens is off by T U at most, relative to its magnitude. A basis turns by that over the relative gap
    behind its last eigenvalue (Davis and Kahan 1970); a fit changes by it times the condition of its system, at most
    K / λ with K columns and λ = 0.1 of the mean diagonal. Every block sees the errors of all before it.
    """
    error = report.tokens * U
    spectra = [
        (torch.tensor(values), width)
        for values, width in zip(report.eigenvalues, widths, strict=True)
        if values is not None and width < len(values)
    ]
    gap = min(float((values[width - 1] - values[width]) / values[0]) for values, width in spectra)
    assert (
        gap > 1e-6
    )  # the tiny model's spectra are smooth: no two eigenvalues at a cut that chance could swap
    return len(widths) * error * (1 / gap + inner / 0.1)


def test_same_model(alone, together):
    sliced, report = alone
    _, outcome = together
    assert outcome["neurons"] == sliced.config.neurons
    assert outcome["tokens"] == report.tokens
    bound = tolerance(report, sliced.config.boundary_widths, sliced.config.dense_intermediate_size)
    assert bound < 1e-6  # nothing that is left out or counted twice hides below it
    assert outcome["ridge_search"] == pytest.approx(report.ridge_search, rel=bound)
    for name, weight in sliced.state_dict().items():
        if weight.numel():  # a shortcut of rank 0 has none
            assert relative_error(outcome["state"][name], weight) <= bound, name


def test_experts_with_tokens_on_some_ranks(together):
    """Tokens of an expert are counted wherever they are, on ranks that have none of them as well."""
    ranks, outcome = together
    outcome = outcome["experts"]
    shared = torch.stack(outcome["ranks_with_tokens"])
    assert ((shared > 0) & (shared < ranks)).any()
    assert (shared == ranks).any()
    sliced, report = ranks_worker.slice_experts(Ranks())
    assert outcome["few_tokens"] == ranks_worker.few_tokens(report)
    # λ is in proportion to a mean over the experts: the diagonal of one of them is up to that many times as large.
    columns = ranks_worker.EXPERTS * sliced.config.dense_moe_intermediate_size
    bound = tolerance(report, sliced.config.boundary_widths, columns)
    assert bound < 1e-6
    assert outcome["ridge_search"] == pytest.approx(report.ridge_search, rel=bound)
    for name, weight in sliced.state_dict().items():
        if weight.numel():
            assert relative_error(outcome["state"][name], weight) <= bound, name


def test_same_losses(together):
    """Every window is evaluated in the batch that one rank puts it into: the same bits."""
    _, outcome = together
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks
    try:
        assert outcome["losses"] == ranks_worker.losses_of_windows(Ranks())
    finally:
        torch.set_num_threads(threads)


def test_messages(together):
    """Sums on rank 0; what it decides arrives everywhere, strides and all."""
    ranks, outcome = together
    exchanged = outcome["exchanged"]
    rows = [
        torch.randn(5, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        for rank in range(ranks)
    ]
    matrix = sum(each.mT @ each for each in rows)
    # Sums of 5 products in each of the ranks: a few U of their magnitude, which the diagonal bounds.
    assert (exchanged["matrix"] - matrix).abs().max() <= 16 * U * matrix.diagonal().max()
    assert torch.equal(exchanged["matrix"], exchanged["matrix"].mT)
    tall = sum(rows)
    assert (exchanged["tall"] - tall).abs().max() <= 4 * U * sum(each.abs() for each in rows).max()
    assert abs(exchanged["number"] - tall.sum()) <= 256 * U * sum(each.abs().sum() for each in rows)
    assert exchanged["right"].tolist() == [ranks, ranks]


def test_one_process_exchanges_nothing():
    ranks, matrix = Ranks(), torch.ones(2, 2)
    ranks.reduce_symmetric_(matrix)
    ranks.sum_(matrix)
    ranks.wait()
    assert torch.equal(matrix, torch.ones(2, 2))
    assert ranks.first
    assert ranks.deal("abc") == "abc"
    assert ranks.decide(lambda: 3) == 3


class Third(Ranks):
    rank, size = 2, 3


def test_dealing():
    assert list(Third().deal(range(8))) == [2, 5]
    assert list(Third().deal(range(2))) == []
    # What rank 0 counts for all adds up to all, batch after batch.
    assert [Third().stands_for(position, 8) for position in range(3)] == [3, 3, 2]


def test_environment(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == Launch()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SliceGPTError, match=r"RANK: must be a whole number .* got ''"):
        launched()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Launch(3, 4, 1)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(SliceGPTError, match="RANK: must be below WORLD_SIZE=4, got 4"):
        launched()


def test_device_of_a_rank(monkeypatch):
    launch = Launch(5, 8, 1)
    assert device_of(launch, "cpu") == torch.device("cpu")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device_of(launch, None) == device_of(launch, "cuda") == torch.device("cuda", 1)
    assert chosen == [1, 1]
    with pytest.raises(
        SliceGPTError, match=r"device: must be auto, cuda or cpu where 8 processes .* got 'cuda:0'"
    ):
        device_of(launch, "cuda:0")
    with pytest.raises(SliceGPTError, match="rank 6 is number 3 on a machine with 2 CUDA devices"):
        device_of(Launch(6, 8, 2), "auto")
