"""Compute the delta of a layer in float64, as the reference for every other result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import delta

Array = NDArray[Any]


def exact_delta(A: Array, B: Array, d: Array, b: Array, in_features: int) -> Array:
    """Return the delta (out, in), computed in float64 from operands of any dtype."""
    A, B, d, b = (array.astype(np.float64) for array in (A, B, d, b))
    return delta(A, B, d, b, in_features)
