"""Find errors in the values of an adapter's tensors: NaN, infinity, a constant A or B."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from vera_convert.adapter.adapter import Adapter
from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorFile
from vera_convert.files.value_range import ValueRange, value_ranges
from vera_convert.rules import PROJECTION_CONSTANT, VALUE_NOT_FINITE, Finding

_SHARED = re.compile(r"(?:.*\.)?vera_[AB](?:\.[^.]+)?")


def value_errors(file: TensorFile, found: Mapping[str, ValueRange]) -> Iterator[Finding]:
    """Yield a finding for each tensor with NaN or infinity, and for a constant A or B.

    Args:
        file: the adapter's weights.
        found: the ranges of values of the tensors, by name.
    """
    for name, extent in found.items():
        if extent.not_finite is not None:
            yield VALUE_NOT_FINITE.in_tensor(name, _where(file, name, extent.not_finite))
    for name, extent in found.items():
        # Any name of A or B counts, because a repaired adapter is checked here too.
        is_shared = _SHARED.fullmatch(name) is not None
        if is_shared and extent.is_constant and file.header.tensors[name].shape != (1, 1):
            reason = f"all its values are the same, of magnitude {extent.magnitude:.3g}."
            yield PROJECTION_CONSTANT.in_tensor(name, reason)


def _where(file: TensorFile, name: str, place: int) -> str:
    info = file.header.tensors[name]
    dtype = NUMPY_DTYPE[info.dtype]
    start = file.header.data_start + info.start + place * dtype.itemsize
    value = np.frombuffer(file.source.read_at(start, dtype.itemsize), dtype)[0]
    index = [int(at) for at in np.unravel_index(place, info.shape)]
    return f"its value at {index} is {float(value)}."


def refuse_values(adapter: Adapter) -> None:
    """Raise `CheckpointError` with every value error of an adapter."""
    findings = [*value_errors(adapter.file, value_ranges(adapter.file))]
    if findings:
        raise CheckpointError.of(findings)
