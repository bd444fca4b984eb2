"""The roofline table: CUDA's names of products."""

import pytest

from slicegpt.bench.models.devices import device_of_product


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", None),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_products_are_recognised(product, name):
    device = device_of_product(product)
    assert (device.name if device else None) == name
