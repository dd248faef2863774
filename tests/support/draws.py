"""Draw and round A and B as PEFT stores both, for every generator and every base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from adapterdefects import A, B
from adapters import HIDDEN, KEY, RANK
from numpy.typing import NDArray

from vera_convert.draws.generator import Draw, Rounding, Variant, rounded

ROUNDINGS = {
    "float64": Rounding.NONE,
    "float32": Rounding.FP32,
    "bfloat16": Rounding.BF16,
    "float16": Rounding.FP16,
    "float16+bfloat16": Rounding.FP16_BF16,
    "bfloat16+float16": Rounding.BF16_FP16,
}
STORED: Mapping[str, Any] = {
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
}


def as_peft_stored(variant: Variant, base: str, dtype: str) -> dict[str, NDArray[Any]] | None:
    """Return A and B as PEFT draws, rounds and stores both; None if `dtype` would change values."""
    pair = Draw(variant, key=KEY, rank=RANK, in_features=HIDDEN, out_features=16).matrices()
    kind = np.dtype(STORED[dtype])
    cast = [rounded(matrix, ROUNDINGS[base]) for matrix in pair]
    stored = [matrix.astype(kind) for matrix in cast]
    exact = all(
        np.array_equal(one.astype(np.float64), other.astype(np.float64))
        for one, other in zip(cast, stored, strict=True)
    )
    return dict(zip((A, B), stored, strict=True)) if exact else None
