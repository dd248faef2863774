"""Compare our float16 conversions of whole arrays with NumPy's casts, for every value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vera_convert.float16 import rounded_to_halves, widened_halves

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = HALVES[np.isfinite(HALVES)]


def rounded(values: NDArray[np.float32]) -> NDArray[Any]:
    out = np.empty(values.shape, np.float16)
    rounded_to_halves(values.copy(), out, np.empty((2, values.size + 3), np.uint32))
    return out


def assert_as_cast(values: NDArray[np.float32]) -> None:
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(rounded(values).view(np.uint16), expected.view(np.uint16))


def test_every_finite_value_is_widened_and_rounded_back() -> None:
    wide = np.empty(FINITE.size, np.float32)
    widened_halves(FINITE, wide)
    assert np.array_equal(wide.view(np.uint32), FINITE.astype(np.float32).view(np.uint32))
    assert np.array_equal(rounded(wide).view(np.uint16), FINITE.view(np.uint16))


def test_the_middle_of_two_values_and_its_neighbors_are_rounded_as_by_a_cast() -> None:
    values = FINITE.astype(np.float32)
    with np.errstate(over="ignore"):
        above = np.nextafter(FINITE, np.float16(np.inf)).astype(np.float32)
    middle = ((values.astype(np.float64) + above) / 2).astype(np.float32)
    middle = middle[np.abs(middle) < 65520]
    for near in (middle, np.nextafter(middle, np.float32(9e4)), np.nextafter(middle, -middle)):
        assert_as_cast(near[np.abs(near) < 65520])


@pytest.mark.parametrize("seed", range(20))
def test_any_float32_is_rounded_as_by_a_cast(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 1 << 16, dtype=np.uint64)
    values = bits.astype(np.uint32).view(np.float32)
    assert_as_cast(values[np.abs(values) < 65520])


@pytest.mark.parametrize("value", [65520.0, 1e30, np.inf, -np.inf, -65520.0])
def test_values_beyond_the_range_become_infinite(value: float) -> None:
    with np.errstate(over="ignore"):
        assert_as_cast(np.array([1.0, value, 3.0], np.float32))


def test_nan_and_infinity_are_kept() -> None:
    found = rounded(np.array([1.0, np.nan], np.float32))
    assert found[0] == 1
    assert np.isnan(found[1])


def test_an_empty_array_is_rounded_to_an_empty_array() -> None:
    assert rounded(np.empty(0, np.float32)).size == 0
