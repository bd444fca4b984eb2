"""Where the streams of the calibration tokens are kept, that they are the same there, and in which order they move."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
import torch
from support.cuda_streams import FakeCuda, RecordedStore
from support.sliced_models import batches
from support.tiny_models import tiny_model

from slicegpt.conversion.plan import Shape, constant_widths, plan
from slicegpt.errors import SliceGPTError
from slicegpt.families import canonical_fields
from slicegpt.slicing import SlicingOptions, slice_model
from slicegpt.slicing.streams import Streams, choose_storage

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("storage", "stream_bytes", "expected"),
    [
        ("auto", 500, "device"),
        ("auto", 501, "host"),
        ("auto", 1000, "host"),
        ("auto", 1001, "disk"),
        ("device", 10**9, "device"),
        ("host", 1, "host"),
        ("disk", 1, "disk"),
    ],
)
def test_on_a_gpu(storage, stream_bytes, expected, monkeypatch):
    """1000 bytes are free on the device and 2000 on the host: half of them may be streams."""
    free = {"cuda": 1000, "cpu": 2000}
    monkeypatch.setattr("slicegpt.slicing.streams.free_memory", lambda device: free[device.type])
    assert choose_storage(storage, stream_bytes, GPU) == expected


@pytest.mark.parametrize(
    ("storage", "stream_bytes", "expected"),
    [
        ("auto", 1000, "device"),
        ("auto", 1001, "disk"),
        ("host", 10**9, "device"),
        ("device", 10**9, "device"),
    ],
)
def test_a_cpu_is_device_and_host(storage, stream_bytes, expected, monkeypatch):
    monkeypatch.setattr("slicegpt.slicing.streams.free_memory", lambda device: 2000)
    assert choose_storage(storage, stream_bytes, CPU) == expected


@pytest.mark.parametrize(
    "make", [lambda name: SlicingOptions(activation_storage=name), lambda name: choose_storage(name, 1, CPU)]
)
def test_unknown_storage(make):
    message = "activation_storage: must be one of auto, device, host, disk, got 'tape'"
    with pytest.raises(SliceGPTError, match=message):
        make("tape")


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 0, 10**9))
    assert choose_storage("disk", 10**9, CPU, tmp_path / "not there yet") == "disk"
    message = r"activation_storage: the streams of the calibration tokens take 2\.0 GB, and of the disk of .* 1\.0 GB"
    with pytest.raises(SliceGPTError, match=message):
        choose_storage("disk", 2 * 10**9, CPU, tmp_path)


@pytest.mark.parametrize("storage", ["device", "disk"])
def test_streams_come_back_as_they_were(storage, tmp_path):
    streams = Streams(batches(3), CPU, storage, tmp_path)
    assert streams.tensors == [None] * 3
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randn(4, 16, 8, generator=generator).to(torch.bfloat16) for _ in streams.batches]
    for index, tensor in enumerate(kept):
        streams[index] = tensor
    for _ in range(3):  # as a block does: every stream is replaced by what it makes of it
        for index, _, stream in streams:
            assert torch.equal(stream, kept[index])
            streams[index] = kept[index] = stream + 1
    assert all(map(torch.equal, streams.tensors, kept))
    assert list(tmp_path.iterdir()) == []


def test_two_streams_side_by_side(tmp_path):
    """As `Propagation.collect` walks through both; the longer one is not read to its end."""
    dense, sliced = Streams(batches(2), CPU, "disk", tmp_path), Streams(batches(3), CPU, "disk", tmp_path)
    for streams in (dense, sliced):
        for index in range(len(streams)):
            streams[index] = torch.full((4, 16, 8), float(index))
    for (index, _, first), (_, _, second) in zip(dense, sliced, strict=False):
        dense[index], sliced[index] = first + 10, second + 20
    assert [tensor[0, 0, 0].item() for tensor in dense.tensors] == [10, 11]
    assert [tensor[0, 0, 0].item() for tensor in sliced.tensors] == [20, 21, 2]


def test_a_disk_that_fills_up_is_noticed(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    streams = Streams(batches(2), CPU, "disk", tmp_path)
    streams[0] = torch.ones(4, 16, 8)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SliceGPTError, match=r"scratch: a temporary file needs"):
        streams[1] = torch.ones(4, 16, 8)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "phi"])
def test_the_same_model_from_every_storage(case, tmp_path):
    """Bit for bit, allocation of neurons, refit and all; and nothing is left on the disk."""
    model = tiny_model(case).float()
    fields = canonical_fields(model)
    config = plan(fields, constant_widths(fields, 40), Shape(round_to=4, neurons=0.2))
    states = []
    for storage in ("device", "disk"):
        options = SlicingOptions(activation_storage=storage, neuron_multiple=4, ridge=0.1, scratch=tmp_path)
        states.append(slice_model(model, config, batches(6), options)[0].state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert list(tmp_path.iterdir()) == []


# --- a GPU's host: the order of the copies ---------------------------------------------------------------------


def run_passes(store: RecordedStore, cuda: FakeCuda, count: int, passes: int) -> list[torch.Tensor]:
    """As a `Streams` walks through a store, with a computation that reads a stream and writes another tensor."""
    streams = Streams(batches(count), CPU)
    streams.store = store
    expected = []
    for index in range(count):
        tensor = torch.full((2, 3), float(index))
        cuda.access(tensor, "the computation's write", True)
        streams[index] = tensor
        expected.append(tensor)
    for _ in range(passes):
        for index, _, stream in streams:
            assert torch.equal(stream, expected[index])
            cuda.access(stream, "the computation's read", False)
            expected[index] = stream + 1
            cuda.access(expected[index], "the computation's write", True)
            streams[index] = expected[index]
    return expected


def test_copies_and_computation_are_ordered():
    cuda = FakeCuda()
    store = RecordedStore(4, cuda)
    expected = run_passes(store, cuda, 4, 3)
    assert cuda.races == []
    assert all(map(torch.equal, store.stored(), expected))
    assert (
        len({access[0] for accesses in cuda.accesses.values() for access in accesses}) == 3
    )  # three streams


@pytest.mark.parametrize("forgotten", ["outwards", "inwards", "running"])
def test_an_order_that_is_forgotten_is_a_race(forgotten):
    """The check above sees each of the three waits that are needed."""
    cuda = FakeCuda()
    store = RecordedStore(3, cuda)
    stream = cuda.running if forgotten == "running" else getattr(store, forgotten)
    stream.wait_event = lambda event: None
    run_passes(store, cuda, 3, 2)
    assert cuda.races


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_streams_on_a_gpu_come_back_as_they_were(storage, tmp_path):
    device = torch.device("cuda", 0)
    streams = Streams(batches(3), device, storage, tmp_path)
    kept = [torch.randn(4, 16, 8, device=device) for _ in streams.batches]
    for index, tensor in enumerate(kept):
        streams[index] = tensor
    for _ in range(3):
        for index, _, stream in streams:
            assert stream.device == device
            assert torch.equal(stream, kept[index])
            streams[index] = kept[index] = stream + 1
