"""Small integers out of bytes and words, in the packings of the formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vera_convert.dtypes import NAMES
from vera_convert.float16 import round_to_halves

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
_CACHED_VALUES = 1 << 16

Rows = Callable[[slice], NDArray[np.float32]]
"""Returns some rows of a matrix, which the caller may overwrite."""

FLOAT_OF = {"BF16": BFLOAT16, "F16": FLOAT16, "F32": FLOAT32}
"""NumPy's dtype by safetensors' name, for the dtypes of dequantized weights."""
DTYPE_OF = {NAMES[header]: header for header in FLOAT_OF}
"""Safetensors' name of these dtypes by torch's name."""

E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
"""The sixteen values of a 4-bit float with two exponent bits and a mantissa bit."""


def pair_table(values: NDArray[Any], *, high_first: bool) -> NDArray[np.uint64]:
    """Return both values of every byte that packs two codes of 4 bits.

    Args:
        values: the float32 value of each of the 16 codes.
        high_first: whether the high half of a byte is the first of the two.

    Returns:
        (256,): two float32 values each, as the bits of a 64-bit integer.
    """
    codes = np.arange(256)
    first, second = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    pairs = np.stack([values[first], values[second]], axis=-1).astype(np.float32)
    return np.ascontiguousarray(pairs).view(np.uint64).reshape(256)


_INTEGER_PAIRS = {
    least: pair_table(np.arange(least, least + 16), high_first=False) for least in (0, -8)
}
"""Both values of a byte with two codes of 4 bits, by the value of the code 0."""


def looked_up(table: NDArray[np.uint64], packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the two values of each byte, by a table of `pair_table`.

    Args:
        table: (256,).
        packed: (..., n).

    Returns:
        (..., 2 n), contiguous.
    """
    return np.take(table, packed, mode="clip").view(np.float32)


def looked_up_rows(table: NDArray[np.uint64], packed: NDArray[np.uint8]) -> Rows:
    """Return the function that looks up some rows of packed codes, as `looked_up` does."""
    return lambda part: looked_up(table, packed[part])


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows for successive computation: each slice fits the cache of a core.

    Slices of eight rows and more have a multiple of eight rows: some formats pack eight together.
    """
    step = max(1, _CACHED_VALUES // max(columns, 1))
    step = step // 8 * 8 or step
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return floats rounded to a dtype. Float16s are returned as float32, and may overwrite values.

    NumPy's casts to float16 and back take longer than all other steps.
    """
    if dtype != FLOAT16:
        return values.astype(dtype, copy=False)
    wide = np.ascontiguousarray(values, np.float32)
    round_to_halves(wide.reshape(-1), np.empty((2, wide.size), np.uint32))
    return wide


def widened(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return values as float32; for 8-bit floats, a table is faster than single conversions."""
    if values.dtype.itemsize != 1 or values.dtype.kind in "iub":
        return values.astype(np.float32)  # a copy, which callers change
    table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
    return np.take(table, values.view(np.uint8), mode="clip")


def rows_of(stored: NDArray[Any]) -> Rows:
    """Return the function that widens some rows of a matrix of integers or floats."""
    return lambda part: widened(stored[part])


def scaled_rows(
    q: Rows,
    shape: tuple[int, ...],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None = None,
    *,
    width: int,
    dtypes: Sequence[np.dtype[Any]],
) -> NDArray[Any]:
    """Return (q - zeros) * scales, computed in float32 and rounded to each of `dtypes` in turn.

    A product of two 16-bit floats is exact in float32, and so is rounded only once.

    The result has the last of `dtypes`; a result of float16s is float32, see `cast`.

    Args:
        q: returns some rows of q, which this function overwrites; all steps find these rows in the
            core's cache.
        shape: n and columns.
        scales: (n, groups) or (1, groups).
        zeros: as `scales`; None for packed values with scales alone.
        width: columns of a group; the last group may be narrower.
        dtypes: the dtypes that the library rounds to.
    """
    rows, columns = shape
    *first, last = dict.fromkeys(dtypes)
    out = np.empty((rows, columns), FLOAT32 if last == FLOAT16 else last)
    scales = np.broadcast_to(scales, (rows, scales.shape[1]))
    zeros = None if zeros is None else np.broadcast_to(zeros, scales.shape)
    whole = columns // width
    for part in pieces(rows, columns):
        values: NDArray[Any] = q(part)
        inner = values[:, : whole * width].reshape(len(values), whole, width)
        rest = values[:, whole * width :]
        if zeros is not None:
            shifts = zeros[part].astype(np.float32)
            inner -= shifts[:, :whole, None]
            rest -= shifts[:, whole:]
        factors = scales[part].astype(np.float32)
        inner *= factors[:, :whole, None]
        rest *= factors[:, whole:]
        for dtype in first:
            values = cast(values, dtype)
        _cast_into(values, last, out[part])
    return out


def _cast_into(values: NDArray[Any], dtype: np.dtype[Any], out: NDArray[Any]) -> None:
    """Set `out`, which is contiguous, to floats rounded to a dtype, as `cast` returns the dtype."""
    out[...] = values
    if dtype == FLOAT16:
        round_to_halves(out.reshape(-1), np.empty((2, out.size), np.uint32))


def integers(words: NDArray[Any], bits: int, count: int, least: int = 0) -> Rows:
    """Return the function that unpacks some rows of dense streams of bits, as `scaled_rows` needs.

    Args:
        words: (rows, columns), each row a stream of 32-bit words, lowest bit first.
        bits: of an element, 1 to 8.
        count: the number of elements of a row to return.
        least: the value of an element of zeros; the function adds `least` to each element.
    """
    if bits == 4:
        pairs = looked_up_rows(_INTEGER_PAIRS[least], np.ascontiguousarray(words).view(np.uint8))
        return lambda part: pairs(part)[:, :count]

    def rows(part: slice) -> NDArray[np.float32]:
        values = stream(words[part], bits, 0, count).astype(np.float32)
        values += np.float32(least)
        return values

    return rows


def fields(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the fields of 32-bit words, the lowest first, where `bits` divides 32.

    Args:
        words: (rows, columns).
        bits: 2, 4 or 8.

    Returns:
        (rows, columns, 32 // bits).
    """
    octets = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    octets = octets.reshape(*words.shape, 4)
    if bits == 8:
        return octets
    mask = np.uint8((1 << bits) - 1)
    parts = [(octets >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(*words.shape, 32 // bits)


def stream(words: NDArray[Any], bits: int, first: int, last: int) -> NDArray[np.uint8]:
    """Return elements of dense streams of bits; elements can cross the borders of words.

    Args:
        words: (rows, columns), each row a stream of 32-bit words, lowest bit first.
        bits: of an element, 1 to 8.
        first: the number of the first element to return.
        last: the number after the last element to return.

    Returns:
        (rows, last - first).
    """
    if 32 % bits == 0 and bits in (2, 4, 8):
        return fields(words, bits).reshape(len(words), -1)[:, first:last]
    octets = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    octets = octets.reshape(len(words), -1)
    octets = np.concatenate([octets, np.zeros((len(octets), 1), np.uint8)], axis=1)
    starts = np.arange(first, last, dtype=np.int64) * bits
    low = octets[:, starts // 8].astype(np.uint16)
    high = octets[:, starts // 8 + 1].astype(np.uint16)
    shifted = (low | (high << np.uint16(8))) >> (starts % 8).astype(np.uint16)
    return (shifted & np.uint16((1 << bits) - 1)).astype(np.uint8)
