"""Find the largest and smallest value of each tensor of a file, in a single pass over the bytes.

An adapter's file holds thousands of short vectors side by side. These are read in spans and
examined together, because separate reads would take more time than the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vera_convert.dtypes import FLOATS
from vera_convert.files.header import TensorInfo
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorFile

_SPAN = 1 << 22
"""The bytes of one read; a multiple of the size of every value."""


class ValueRange(NamedTuple):
    """The range of the values of one tensor.

    Attributes:
        magnitude: the largest absolute value; NaN if any value is infinite or NaN.
        is_constant: whether all values are the same.
        not_finite: the index, in stored order, of the first value that is infinite or NaN; None if
            there is none.
    """

    magnitude: float
    is_constant: bool
    not_finite: int | None = None


def value_ranges(file: TensorFile) -> dict[str, ValueRange]:
    """Return the range of each non-empty float tensor, by name.

    Raises:
        SurroundingsError: the file cannot be read, or changed since the opening.
    """
    infos = file.header.tensors.values()
    floats = [info for info in infos if info.dtype in FLOATS and info.nbytes]
    found: dict[str, ValueRange] = {}
    for group in _side_by_side(sorted(floats, key=attrgetter("start"))):
        if len(group) == 1:
            found[group[0].name] = _of_one(file, group[0])
        else:
            found |= _of_many(file, group)
    file.source.check_unchanged()
    return found


def _side_by_side(tensors: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Yield groups of adjacent tensors of one dtype, each group at most a span long."""
    group: list[TensorInfo] = []
    for info in tensors:
        if group and (
            info.dtype != group[0].dtype
            or info.start != group[-1].end
            or info.end - group[0].start > _SPAN
        ):
            yield group
            group = []
        group.append(info)
    if group:
        yield group


def _of_many(file: TensorFile, group: list[TensorInfo]) -> dict[str, ValueRange]:
    values = _values(file, group[0].dtype, group[0].start, group[-1].end)
    width = NUMPY_DTYPE[group[0].dtype].itemsize
    starts = np.array([(info.start - group[0].start) // width for info in group])
    largest, least = np.maximum.reduceat(values, starts), np.minimum.reduceat(values, starts)
    magnitude = np.maximum(np.abs(largest), np.abs(least))
    finite = np.isfinite(magnitude)
    records = map(ValueRange, magnitude.tolist(), (largest == least).tolist())
    found = dict(zip((info.name for info in group), records, strict=True))
    for place in np.flatnonzero(~finite):
        found[group[place].name] = _of_one(file, group[place])
    return found


def _of_one(file: TensorFile, info: TensorInfo) -> ValueRange:
    """Return the range of one tensor of any size, span by span."""
    largest, least, not_finite = -math.inf, math.inf, None
    width = NUMPY_DTYPE[info.dtype].itemsize
    for start in range(info.start, info.end, _SPAN):
        values = _values(file, info.dtype, start, min(start + _SPAN, info.end))
        high, low = float(values.max()), float(values.min())
        if not_finite is None and not (math.isfinite(high) and math.isfinite(low)):
            not_finite = (start - info.start) // width + int(np.argmin(np.isfinite(values)))
        # NumPy's functions, because Python's lose a NaN.
        largest, least = float(np.maximum(largest, high)), float(np.minimum(least, low))
    magnitude = math.nan if not_finite is not None else max(abs(largest), abs(least))
    return ValueRange(magnitude, largest == least, not_finite)


def _values(file: TensorFile, dtype: str, start: int, end: int) -> NDArray[Any]:
    """Return the values between two offsets of the data, 16-bit ones widened to float32."""
    raw = np.empty(end - start, np.uint8)
    file.source.read_into(file.header.data_start + start, raw.data)
    values = raw.view(NUMPY_DTYPE[dtype])
    return values.astype(np.float32) if values.dtype.itemsize == 2 else values
