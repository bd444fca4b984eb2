"""Where the streams of the calibration tokens are kept, and that they are the same there."""

import pytest
import torch
from support.sliced_models import batches

from slicegpt.errors import SliceGPTError
from slicegpt.slicing import SlicingOptions
from slicegpt.slicing.streams import Streams, choose_storage

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("storage", "stream_bytes", "expected"),
    [("auto", 500, GPU), ("auto", 501, CPU), ("device", 10**9, GPU), ("host", 1, CPU)],
)
def test_on_a_gpu(storage, stream_bytes, expected, monkeypatch):
    """A device with 1000 bytes free: half of them may be streams."""
    monkeypatch.setattr("slicegpt.slicing.streams.free_memory", lambda device: 1000)
    assert choose_storage(storage, stream_bytes, GPU) == expected


@pytest.mark.parametrize("storage", ["auto", "device", "host"])
def test_on_a_cpu_there_is_one_place(storage):
    assert choose_storage(storage, 10**15, CPU) == CPU


@pytest.mark.parametrize(
    "make", [lambda name: SlicingOptions(activation_storage=name), lambda name: choose_storage(name, 1, CPU)]
)
def test_unknown_storage(make):
    message = "activation_storage: must be one of auto, device, host, got 'disk'"
    with pytest.raises(SliceGPTError, match=message):
        make("disk")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("storage", [CPU, torch.device("cuda", 0)])
def test_streams_come_back_as_they_were(storage):
    device = torch.device("cuda", 0)
    streams = Streams(batches(3), device, storage)
    kept = [torch.randn(4, 16, 8, device=device) for _ in streams.batches]
    for _ in range(2):  # a host's buffers are used again
        for index, tensor in enumerate(kept):
            streams[index] = tensor
        for (_, _, stream), tensor in zip(streams, kept, strict=True):
            assert stream.device == device
            assert torch.equal(stream, tensor)
        kept = [tensor + 1 for tensor in kept]
