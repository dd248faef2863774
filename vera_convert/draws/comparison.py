"""Compare a stored pair A and B with a draw, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.draws.generator import BLOCK, Draw, redrawn


@dataclass(frozen=True, slots=True)
class Difference:
    """How a stored pair differs from a draw.

    Attributes:
        tensor: ``vera_A``, or ``vera_B`` if only B differs.
        index: row and column of the first difference.
        found: the stored value there.
        expected: the drawn value there.
        largest: the largest absolute difference in A and B; infinite beside a NaN or an infinity,
            zero if only signs of zeros differ.
        count: the number of different values in A and B.
    """

    tensor: str
    index: tuple[int, int]
    found: float
    expected: float
    largest: float
    count: int

    @property
    def description(self) -> str:
        """A sentence about the difference, for people."""
        row, column = self.index
        values = "one value differs" if self.count == 1 else f"{self.count:,} values differ"
        return (
            f"{values}, first {self.tensor}[{row}, {column}]: stored {self.found!r}, "
            f"drawn {self.expected!r}; the largest difference is {self.largest:.3g}"
        )


@np.errstate(invalid="ignore")
def difference(A: NDArray[Any], B: NDArray[Any], draw: Draw) -> Difference | None:
    """Return how a stored pair differs from a draw of at least the same size; None if equal.

    A and B are compared with the leading slices of the draw, bit for bit, after widening to the
    larger of the two dtypes.

    Raises:
        ValueError: the shapes do not belong to a pair of the draw's rank, or exceed the draw.
    """
    check_shapes(A, B)
    if draw.rank != A.shape[0] or draw.in_features < A.shape[1] or draw.out_features < B.shape[0]:
        raise ValueError(f"A {A.shape} and B {B.shape} are no slices of {draw.description}")
    first: Difference | None = None
    largest, count = 0.0, 0
    for tensor, row, stored, drawn, unequal in compared(A, B, draw):
        if not unequal.any():
            continue
        found = stored[unequal].astype(np.float64)
        expected = drawn[unequal].astype(np.float64)
        if first is None:
            at, column = divmod(int(unequal.argmax()), unequal.shape[1])
            first = Difference(
                tensor, (row + at, column), float(found[0]), float(expected[0]), 0.0, 0
            )
        gaps = np.abs(found - expected)
        largest = max(largest, float(np.where(np.isnan(gaps), np.inf, gaps).max()))
        count += found.size
    return None if first is None else replace(first, largest=largest, count=count)


def equals(A: NDArray[Any], B: NDArray[Any], draw: Draw) -> bool:
    """Say whether a stored pair equals the leading slices of a draw in every bit."""
    return not any(unequal.any() for *_, unequal in compared(A, B, draw))


def check_shapes(A: NDArray[Any], B: NDArray[Any]) -> None:
    """Raise `ValueError` unless the shapes are (r, in) for A and (out, r) for B."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.size or not B.size:
        raise ValueError(f"A {A.shape} and B {B.shape} are not of shapes (r, in) and (out, r)")


def compared(
    A: NDArray[Any], B: NDArray[Any], draw: Draw, *, block: int = BLOCK
) -> Iterator[tuple[str, int, NDArray[Any], NDArray[Any], NDArray[np.bool_]]]:
    """Compare a stored A (r, in) and B (out, r) with the leading slices of a draw, in blocks.

    Yields:
        ``vera_A`` or ``vera_B``, the number of the first row, the stored rows, the drawn rows, and
        where the two are unequal in any bit.
    """
    stored = {"vera_A": A, "vera_B": B}
    blocks = redrawn(draw, in_features=A.shape[1], out_features=B.shape[0], block=block)
    for tensor, row, drawn in blocks:
        rows = stored[tensor][row : row + len(drawn)]
        yield tensor, row, rows, drawn, unequal_bits(rows, drawn)


def unequal_bits(first: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Say where values differ in any bit; the arrays are first widened, exactly."""
    wide = np.float64 in (first.dtype, other.dtype)
    dtype, pattern = (np.float64, np.uint64) if wide else (np.float32, np.uint32)
    left = first.astype(dtype, copy=False).view(pattern)
    right = other.astype(dtype, copy=False).view(pattern)
    unequal: NDArray[np.bool_] = left != right
    return unequal
