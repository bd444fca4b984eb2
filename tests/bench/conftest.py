"""A tiny dense model with random weights, as a folder and as networks; a CPU whose peaks are measured quickly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model

from slicegpt.bench.models import devices
from slicegpt.bench.models.networks import MeasuredNetwork, sized_network
from slicegpt.conversion.plan import Shape
from slicegpt.families import canonical_fields

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 48 with untied head and room for 4096 tokens. Do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", torch.float32, max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_networks() -> Callable[..., list[MeasuredNetwork]]:
    """A family's networks at some fractions, with random weights, in float32 on the CPU."""

    def build(
        fractions=(0.0, 0.5), family: str = "llama", shortcut: str = "compact", **changes
    ) -> list[MeasuredNetwork]:
        model = tiny_model(family, torch.float32, **changes)
        fields = canonical_fields(model)
        shape = Shape(shortcut, round_to=8)
        return [
            sized_network(family, fields, fraction, torch.float32, CPU, model.config, None, shape)
            for fraction in fractions
        ]

    return build


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of this CPU from products and copies so small that they take milliseconds instead of many seconds."""
    measure = devices.measured_cpu
    monkeypatch.setattr(
        devices, "measured_cpu", lambda **options: measure(size=64, copy_bytes=1 << 20, **options)
    )
