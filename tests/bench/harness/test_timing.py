"""Quantiles of times."""

import numpy

from slicegpt.bench.harness.timing import quantiles


def test_quantiles_are_those_of_numpy():
    values = list(numpy.random.default_rng(0).normal(size=37))
    seen = quantiles(values)
    expected = numpy.quantile(values, [0.5, 0.1, 0.9])
    numpy.testing.assert_allclose([seen.median, seen.p10, seen.p90], expected, rtol=1e-12)
    assert quantiles([3.0]) == quantiles([3.0, 3.0])
