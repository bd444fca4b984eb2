"""The shapes that the benchmarks of the fused GEMMs take are those that the runtime packs."""

import pytest

from slicegpt.bench.commands.layer_ops import one_layer
from slicegpt.bench.models import shapes
from slicegpt.bench.models.architectures import MODELS, sliced_config
from slicegpt.bench.models.shapes import NormLinearShape, RotateAddShape, launches
from slicegpt.modeling.sizes import skeleton
from slicegpt.runtime import pack


def launches_of_packed_layer(model: str, fraction: float, shortcut: str) -> list[tuple]:
    """What the runtime launches for one layer, read off its packed weights."""
    config = sliced_config(model, fraction, "compact" if shortcut == "identity" else shortcut)
    found = []
    for block in pack(skeleton(one_layer(config)), 1).blocks:
        for projection in block.inputs:
            columns, inner = projection.weight.shape
            bias = projection.bias is not None
            found.append((inner, columns, projection.n_scaled, projection.activation, bias))
        columns, inner = block.output.shape
        found.append((inner, columns, block.shortcut is not None, block.output_bias is not None))
    return found


@pytest.mark.parametrize("size", [(0.0, "identity"), (0.25, "compact"), (0.25, "dense")], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_architecture_launches_what_the_runtime_packs(model, size):
    seen = []
    for launch in launches(model, *size):
        if isinstance(launch, NormLinearShape):
            assert launch.columns == launch.n_scaled + launch.z_columns
            seen.append((launch.inner, launch.columns, launch.n_scaled, launch.activation, launch.bias))
        else:
            assert isinstance(launch, RotateAddShape)
            assert launch.total_inner == launch.inner + launch.dense * launch.width
            seen.append((launch.inner, launch.columns, launch.dense, launch.bias))
    assert seen == launches_of_packed_layer(model, *size)


def test_benchmarked_models_are_architectures():
    assert set(shapes.MODELS) <= set(MODELS)
