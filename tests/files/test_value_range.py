"""The value ranges of many tensors, read together, equal those of each tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vera_convert.files import value_range as module
from vera_convert.files.reading import open_local
from vera_convert.files.tensorfile import TensorFile
from vera_convert.files.value_range import ValueRange, value_ranges

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def of(path: Path, tensors: dict[str, NDArray[Any]]) -> dict[str, ValueRange]:
    save_file(tensors, path)
    with open_local(path) as source:
        return value_ranges(TensorFile(source))


def expected(array: NDArray[Any]) -> ValueRange:
    values = array.astype(np.float64).ravel()
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        return ValueRange(math.nan, bool((values == values[0]).all()), int(bad[0]))
    return ValueRange(float(np.abs(values).max()), bool((values == values[0]).all()))


def same(one: ValueRange, other: ValueRange) -> bool:
    magnitude = one.magnitude == other.magnitude or math.isnan(one.magnitude + other.magnitude)
    return magnitude and one[1:] == other[1:]


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 1e-40, 3e4])


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(SPECIAL, max_size=5)), max_size=8))
def test_ranges_of_many_tensors_equal_those_of_each_tensor(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Any, list[float]]]
) -> None:
    tensors = {f"t{n}": np.array(values).astype(dtype) for n, (dtype, values) in enumerate(drawn)}
    found = of(tmp_path_factory.mktemp("value_ranges") / "file", tensors)
    full = {name: array for name, array in tensors.items() if array.size}
    assert found.keys() == full.keys()
    for name, array in full.items():
        assert same(found[name], expected(array)), name


def test_a_tensor_of_many_spans_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPAN", 64)
    array = np.ones((7, 10), np.float32)
    array[6, 9] = np.inf
    assert of(tmp_path / "file", {"t": array})["t"].not_finite == 69
    array[6, 9] = -8
    assert of(tmp_path / "other", {"t": array})["t"] == ValueRange(8.0, is_constant=False)


def test_tensors_of_other_dtypes_are_skipped(tmp_path: Path) -> None:
    assert of(tmp_path / "file", {"i": np.ones(3, np.int32), "b": np.ones(2, np.bool_)}) == {}
