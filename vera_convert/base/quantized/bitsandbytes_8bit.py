"""bitsandbytes 8-bit: integers, times the largest value of each row, divided by 127.

W = float32(float32(q * SCB[row]) * float32(1 / 127))
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vera_convert.base.quantized.layer import (
    Array,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
)

_STEP = np.float32(0.007874015718698502)


def dequantized(q: Array, largest: Array) -> NDArray[np.float32]:
    """Return rows in float32.

    Args:
        q: (n, columns), int8.
        largest: (n,), float32, the largest value of each row.
    """
    values = q.astype(np.float32)
    values *= largest[:, None]
    values *= _STEP
    return values


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed.
    """
    rows, columns = layer.main("weight", ("I8",))
    largest = layer.part("SCB", ("F32",), (rows,))
    checks = {largest: finite}
    if "weight_format" in layer.tensors:
        checks[layer.part("weight_format", ("U8",), ())] = _row_major
    weight = layer.name("weight")

    def decode(read: PartReader, first: int, last: int) -> Array:
        return dequantized(read.rows(weight, first, last), read.flat(largest, first, last))

    parts = layer.refuse_others(("weight", "SCB", "weight_format"))
    yield PackedWeight(weight, (rows, columns), weight, parts, decode, checks)


def _row_major(values: Array) -> str | None:
    return "it is not 0: the weight is laid out for one kind of GPU." if values.any() else None


FORMAT = Format(
    "bitsandbytes 8-bit",
    "bitsandbytes",
    weights,
    signs="SCB|weight_format",
    dtypes=("I8",),
    cast="none",
)
