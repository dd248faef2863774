"""The table of dtypes: its names, sizes and precision agree with NumPy and ml_dtypes."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vera_convert.dtypes import (
    BITS,
    FLOAT_NAMES,
    FLOATS,
    NAMES,
    PRECISION,
    SIXTEEN_BIT,
    float_name,
    holds_every_value,
)
from vera_convert.files.tensorfile import NUMPY_DTYPE


@pytest.mark.parametrize("header", NUMPY_DTYPE)
def test_a_value_takes_as_many_bytes_in_numpy_as_in_a_file(header: str) -> None:
    assert NUMPY_DTYPE[header].itemsize * 8 == BITS[header]
    assert NUMPY_DTYPE[header].name == NAMES[header]


@pytest.mark.parametrize("header", PRECISION)
def test_the_precision_of_a_float_equals_that_of_ml_dtypes(header: str) -> None:
    limits = ml_dtypes.finfo(NUMPY_DTYPE[header])  # type: ignore[no-untyped-call]
    assert PRECISION[header].mantissa == limits.nmant
    assert 2.0 ** PRECISION[header].lowest == float(limits.smallest_normal)


def test_there_are_two_floats_of_16_bits() -> None:
    assert {"F64", "F32", "F16", "BF16"} == FLOATS
    assert {"F16", "BF16"} == SIXTEEN_BIT
    assert FLOAT_NAMES == ("float64", "float32", "bfloat16", "float16")


def every_value(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return every finite value of a 16-bit dtype; of a wider dtype, return the most extreme
    values.
    """
    if dtype.itemsize == 2:
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        finite: np.ndarray[Any, Any] = values[np.isfinite(values)]
        return finite
    limits = np.finfo(dtype)
    return np.array([limits.tiny, limits.max, 1 + limits.eps], dtype)


@np.errstate(all="ignore")
@pytest.mark.parametrize(("wide", "narrow"), [*itertools.product(PRECISION, PRECISION)])
def test_a_dtype_holds_every_value_of_another_if_these_come_back_unchanged(
    wide: str, narrow: str
) -> None:
    values = every_value(NUMPY_DTYPE[narrow])
    back = values.astype(NUMPY_DTYPE[wide]).astype(NUMPY_DTYPE[narrow])
    assert holds_every_value(wide, narrow) == bool((back == values).all())


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("half", "float16"),
        ("double", "float64"),
        ("float", "float32"),
        ("torch.FP32", "float32"),
        ("float8_e4m3fn", None),
        ("int8", None),
        ("torch.", None),
        ("", None),
    ],
)
def test_every_usual_spelling_of_a_dtype_is_accepted(written: str, name: str | None) -> None:
    assert float_name(written) == name
