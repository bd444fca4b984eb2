"""What the benchmark of the fused GEMMs measures under pytest."""

import itertools

from slicegpt.bench.kernels.bench_rotation import QUICK_MODELS, QUICK_SIZES, ROWS, cases, name_of
from slicegpt.bench.models.shapes import MODELS, SIZES, launches


def models_and_sizes(chosen) -> set:
    return {(model, size) for model, size, *_ in chosen}


def test_every_model_at_every_size():
    for chosen in (cases("all", on_gpu=False), cases("", on_gpu=True)):
        assert models_and_sizes(chosen) == set(itertools.product(MODELS, SIZES))
        assert len(chosen) == sum(len(launches(m, *s)) for m in MODELS for s in SIZES) * len(ROWS)
        assert len({name_of(case) for case in chosen}) == len(chosen)
    assert {100 * fraction for fraction, _ in SIZES} == {0, 20, 25, 30, 50}


def test_named_models_and_the_quick_subset():
    chosen = models_and_sizes(cases("phi-2 llama-2-7b", on_gpu=False))
    assert chosen == set(itertools.product(("phi-2", "llama-2-7b"), SIZES))
    assert models_and_sizes(cases("", on_gpu=False)) == set(itertools.product(QUICK_MODELS, QUICK_SIZES))
