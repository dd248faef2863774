"""Draw A and B as torch's CPU generator draws them, bit for bit, with NumPy alone.

    key -> MT19937 words -> k, the low bits of a word, centered on zero -> k times a step: A, then B

PEFT fills both matrices with Kaiming-uniform values in [-t, t), where t depends on the number of
columns alone. The same generator fills A, then B, row by row, so the width of A decides every value
of B. The value that torch makes of a word depends on torch's default dtype while the adapter was
wrapped, on the CPU (multiply and add fused, or rounded separately) and, for the 16-bit dtypes, on
torch's version. These are the ten variants.

NumPy's legacy `RandomState` has the same state as torch's generator, and NumPy's policy freezes the
stream. For a range of a power of two, `randint` takes one masked word for each value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vera_convert.dtypes import HEADER_NAMES, holds_every_value
from vera_convert.progress import counter

BLOCK = 1 << 17
"""Values per step: half a megabyte of words, enough to hide the cost of the calls."""

_FLOAT16 = np.dtype(np.float16)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)


class Variant(StrEnum):
    """How torch turns random words into values: default dtype, and CPU path or version.

    Attributes:
        dtype: the dtype of the values drawn.
        bits: the number of low bits of a random word in each value.
        is_fused: whether the CPU multiplies and adds in a single step, and so rounds once.
    """

    dtype: np.dtype[Any]
    bits: int
    is_fused: bool

    FLOAT32_FUSED = "float32-fused"
    """The draw of nearly every machine: x86-64 with AVX2 or later, and aarch64."""
    FLOAT32_SEPARATE = "float32-separate", _FLOAT32, 24, False
    FLOAT64_FUSED = "float64-fused", _FLOAT64, 53
    FLOAT64_SEPARATE = "float64-separate", _FLOAT64, 53, False
    BFLOAT16_2_11 = "bfloat16-torch2.11", _BFLOAT16, 8
    BFLOAT16_2_12_FUSED = "bfloat16-torch2.12-fused", _BFLOAT16
    BFLOAT16_2_12_SEPARATE = "bfloat16-torch2.12-separate", _BFLOAT16, 24, False
    FLOAT16_2_11 = "float16-torch2.11", _FLOAT16, 11
    FLOAT16_2_12_FUSED = "float16-torch2.12-fused", _FLOAT16
    FLOAT16_2_12_SEPARATE = "float16-torch2.12-separate", _FLOAT16, 24, False

    def __new__(
        cls,
        name: str,
        dtype: np.dtype[Any] = _FLOAT32,
        bits: int = 24,
        is_fused: bool = True,  # noqa: FBT001, FBT002 -- a row of the table above
    ) -> Self:
        """Make a variant from a row of the table above."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.dtype, member.bits, member.is_fused = dtype, bits, is_fused
        return member


class Rounding(StrEnum):
    """The casts that PEFT applies to drawn values, in order: one for each dtype of the layers."""

    NONE = "none"
    BF16 = "bf16"
    FP16 = "fp16"
    FP16_BF16 = "fp16+bf16"
    BF16_FP16 = "bf16+fp16"
    FP32 = "fp32"
    """A float32 base; this cast changes the float64 draws only."""
    FP8 = "fp8"
    """A base whose layers stay fp8 in memory; the cast is to float8_e4m3fn."""

    @property
    def casts(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of the casts."""
        return () if self is Rounding.NONE else tuple(_CASTS[name] for name in self.split("+"))


_CASTS: dict[str, np.dtype[Any]] = {
    "bf16": _BFLOAT16,
    "fp16": _FLOAT16,
    "fp32": _FLOAT32,
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


_ON_BASE = {
    "F64": Rounding.NONE,
    "F32": Rounding.FP32,
    "BF16": Rounding.BF16,
    "F16": Rounding.FP16,
    "F8_E4M3": Rounding.FP8,
}


def rounding_on_base(dtype: str) -> Rounding:
    """Return the cast that PEFT applies to drawn A and B if the base has this dtype.

    The cast of a float32 base changes float64 draws alone; see `Draw.rounded`.

    Args:
        dtype: torch's or safetensors' name of a floating-point dtype.
    """
    return _ON_BASE[HEADER_NAMES.get(dtype, dtype)]


@dataclass(frozen=True, slots=True)
class Draw:
    """A draw of A and B: everything that decides the values.

    Attributes:
        variant: how torch turned random words into values.
        key: the seed; keys that agree modulo 2^32 give the same draw.
        rank: rows of A, columns of B.
        in_features: columns of the drawn A.
        out_features: rows of the drawn B.
        rounding: the casts after the draw.
    """

    variant: Variant
    key: int
    rank: int
    in_features: int
    out_features: int
    rounding: Rounding = Rounding.NONE

    def has_key(self, key: int) -> bool:
        """Say whether this key gives the same draw."""
        return (self.key - key) % 2**32 == 0

    def rounded(self, rounding: Rounding) -> Draw:
        """Return this draw with a rounding, or with none if the casts change no value."""
        drawn = HEADER_NAMES[self.variant.dtype.name]
        casts = (HEADER_NAMES[cast.name] for cast in rounding.casts)
        is_exact = all(holds_every_value(cast, drawn) for cast in casts)
        return replace(self, rounding=Rounding.NONE if is_exact else rounding)

    def matrices(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return A (rank, in_features) and B (out_features, rank), as torch drew, and rounded.

        Without a rounding, both matrices have the variant's dtype. The function takes a few
        megabytes beside the result.

        Raises:
            ValueError: torch refuses the key, or a dimension is below 1.
        """
        shapes = (self.rank, self.in_features), (self.out_features, self.rank)
        if min(*shapes[0], *shapes[1]) < 1:
            raise ValueError(f"the dimensions must be at least one, not {shapes}")
        dtype = self.variant.dtype if self.rounding is Rounding.NONE else _FLOAT32
        A, B = (np.empty(shape, dtype) for shape in shapes)
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        for tensor, row, rows in redrawn(self, **sizes):
            (A if tensor == "vera_A" else B)[row : row + len(rows)] = rows
        return A, B

    @property
    def description(self) -> str:
        """A phrase with the name of the draw, for people."""
        phrase = (
            f"the {self.variant} draw of key {self.key} "
            f"for r = {self.rank}, {self.in_features} inputs, {self.out_features} outputs"
        )
        return phrase if self.rounding is Rounding.NONE else f"{phrase}, {self.cast}"

    @property
    def cast(self) -> str:
        """The rounding as a phrase, for people."""
        casts = ", then to ".join(cast.name for cast in self.rounding.casts)
        return f"rounded to {casts}" if casts else "not rounded"


@np.errstate(over="ignore")  # beyond the range means infinity, in torch too
def rounded(array: NDArray[Any], rounding: Rounding) -> NDArray[Any]:
    """Return the values after the casts of a rounding (to nearest, ties to even).

    With `Rounding.NONE` the result is the array itself, in its own dtype; else a float32 array of
    the same shape, as PEFT holds A and B after a load. A float64 value is rounded to float32 and
    then to 16 bits, as in torch.
    """
    if rounding is Rounding.NONE:
        return array
    values = array.astype(_FLOAT32, copy=False)
    for dtype in rounding.casts:
        values = values.astype(dtype, copy=False).astype(_FLOAT32, copy=False)
    return values


def check_key(key: object) -> int:
    """Return the key if torch's generator takes the key as a seed.

    Raises:
        ValueError: the key is a boolean or no integer, or lies outside -2^63 .. 2^64-1.
    """
    if isinstance(key, bool) or not isinstance(key, int):
        name = type(key).__name__
        raise ValueError(f"the key must be an integer, not {name}")  # noqa: TRY004 -- as below
    if not -(2**63) <= key < 2**64:
        raise ValueError("the key must lie in -2^63 .. 2^64-1, the range that torch accepts")
    return key


class Source:
    """The generator of a key: values in torch's order."""

    def __init__(self, variant: Variant, *, key: int) -> None:
        self.variant = variant
        self._words = np.random.RandomState(check_key(key) % 2**32)

    def fill(
        self,
        out: NDArray[Any],
        *,
        fan_in: int,
        count: Callable[[int], None] = lambda _size: None,
    ) -> None:
        """Fill `out`, C-contiguous and of the variant's dtype, with the next values.

        Args:
            out: the array.
            fan_in: the number of columns of the whole matrix.
            count: called with the bytes of each filled part.
        """
        flat = out.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            valued(self.variant, self.centered(part.size), fan_in=fan_in, out=part)
            count(part.nbytes)

    def centered(self, count: int) -> NDArray[Any]:
        """Return the next `count` centered integers k, -2^(bits-1) <= k < 2^(bits-1)."""
        half = 1 << (self.variant.bits - 1)
        # Narrower integer types would cut several values out of a word; torch never does.
        dtype = np.int64 if self.variant.bits > 32 else np.int32
        return self._words.randint(-half, half, count, dtype=dtype)


def valued(
    variant: Variant,
    centered: NDArray[Any],
    *,
    fan_in: int | NDArray[Any],
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return torch's values for centered integers, in the variant's dtype.

    Every line is an IEEE operation. The fused result is k times the step, because k is exact and
    the product is rounded once.

    Args:
        variant: the variant.
        centered: the integers k of `Source.centered`, of any shape.
        fan_in: the number of columns of the whole matrix; an array of numbers broadcasts against
            `centered`.
        out: filled and returned, if given; of the result's shape, in the variant's dtype.
    """
    # The arithmetic of the 16-bit variants is in float32, and the result is rounded.
    precise: np.dtype[Any] = _FLOAT64 if variant.dtype == _FLOAT64 else _FLOAT32
    half = 1 << (variant.bits - 1)
    bound = np.asarray(math.sqrt(3.0) * (math.sqrt(2.0) / np.sqrt(fan_in))).astype(precise)
    if variant.bits < 24:
        bound = bound.astype(variant.dtype).astype(precise)
    step = bound / precise.type(half)
    work = out if variant.dtype == precise else None
    values: NDArray[Any]
    if variant.is_fused:
        values = np.multiply(centered, step, out=work, dtype=precise, casting="unsafe")
    else:
        values = np.add(centered, half, out=work, dtype=precise, casting="unsafe")
        values = np.multiply(values, step, out=work)
        values = np.subtract(values, bound, out=work)
    if variant.dtype == precise:
        return values
    narrow = np.empty(values.shape, variant.dtype) if out is None else out
    narrow[...] = values
    if variant.bits == 24:
        _reflect(narrow, bound.astype(variant.dtype))
    return narrow


def _reflect(values: NDArray[Any], bound: NDArray[Any]) -> None:
    """Replace each value rounded up to the excluded bound by minus the bound."""
    patterns = values.view(np.uint16)
    reached = patterns == bound.view(np.uint16)
    if reached.any():
        np.bitwise_or(patterns, 0x8000, out=patterns, where=reached)


def redrawn(
    draw: Draw, *, in_features: int, out_features: int, block: int = BLOCK
) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """Yield the leading slices of a draw's A (r, in) and B (out, r) in order, a few rows at a time.

    Args:
        draw: the draw.
        in_features: columns of A to keep, at most those of the draw.
        out_features: rows of B to draw, at most those of the draw.
        block: about how many values an item has; an item has at least a row of the drawn width.

    Yields:
        ``vera_A`` or ``vera_B``, the number of the first row, and the rounded rows.
    """
    source = Source(draw.variant, key=draw.key)
    values = draw.rank * (draw.in_features + out_features)
    count = counter("regenerated", values * draw.variant.dtype.itemsize)
    for tensor, rows, width, kept in (
        ("vera_A", draw.rank, draw.in_features, in_features),
        ("vera_B", out_features, draw.rank, draw.rank),
    ):
        step = max(1, block // width)
        for row in range(0, rows, step):
            drawn = np.empty((min(step, rows - row), width), draw.variant.dtype)
            source.fill(drawn, fan_in=width, count=count)
            yield tensor, row, rounded(drawn[:, :kept], draw.rounding)


def first_words(keys: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """Return the first `count` random words (at most 227) of many keys at once: (count, len(keys)).

    The function fills the state only as far as the words need, then twists and tempers the state,
    for all keys in step. Thousands of keys take milliseconds; in turn, the keys would take seconds.
    """
    near = np.empty((count + 1, keys.size), np.uint32)
    far = np.empty((count, keys.size), np.uint32)
    state = keys.astype(np.uint32)
    near[0] = state
    for i in range(1, 397 + count):
        state = np.bitwise_xor(state, state >> np.uint32(30), out=state)
        state *= np.uint32(1812433253)
        state += np.uint32(i)
        if i <= count:
            near[i] = state
        if i >= 397:
            far[i - 397] = state
    mixed = (near[:-1] & np.uint32(0x80000000)) | (near[1:] & np.uint32(0x7FFFFFFF))
    words: NDArray[np.uint32]
    words = far ^ (mixed >> np.uint32(1)) ^ ((mixed & np.uint32(1)) * np.uint32(0x9908B0DF))
    words ^= words >> np.uint32(11)
    words ^= (words << np.uint32(7)) & np.uint32(0x9D2C5680)
    words ^= (words << np.uint32(15)) & np.uint32(0xEFC60000)
    words ^= words >> np.uint32(18)
    return words


def centered_words(variant: Variant, words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return a variant's centered integers for words; a value takes one or two rows."""
    wide = words.astype(np.int64)
    if variant.bits > 32:
        wide = ((wide[0::2] & 0x1FFFFF) << 32) | wide[1::2]
    half = 1 << (variant.bits - 1)
    return (wide & (2 * half - 1)) - half
