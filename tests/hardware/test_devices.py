"""The facts that choose implementations agree with the roofline table of the benchmarks."""

import pytest

from slicegpt.bench.models.devices import DEVICES, device_named
from slicegpt.hardware.devices import FP64_TENSOR_CORES, RATES


@pytest.mark.parametrize(
    "device", [device_named(name) for name in ("B200", "H100 SXM", "A100 80GB", "RTX 4090")]
)
def test_rates_agree(device):
    rates = RATES[device.capability]
    assert (rates.fp64_tflops, rates.int8_tops) == (device.fp64, device.int8)
    assert rates.bandwidth_tbs == pytest.approx(device.bandwidth / 1000)


def test_float64_tensor_cores_show_in_the_rates():
    for device in DEVICES:
        assert (device.capability in FP64_TENSOR_CORES) == (device.fp64 >= device.fp32 / 2)
