"""A merged tensor as data: what is stored, the deltas that are added to it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import FLOAT32

Array = NDArray[Any]

BLOCK_VALUES = 1 << 21
"""Values in a block. Half as many cost 3 % of speed, since the BLAS packs A once for each block;
twice as many would win 1 %."""


class Layer(Protocol):
    """Where the two vectors of an adapted layer come from."""

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of the two."""

    def vectors(self) -> tuple[Array, Array]:
        """Return d (r,) and b (out,), each in its own dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """What one adapter adds to one tensor.

    Attributes:
        A: (r, in or more), in any float dtype.
        B: (out or more, r).
        layer: gives d and b when they are needed.
        weight: the factor of the whole delta.
    """

    A: Array
    B: Array
    layer: Layer
    weight: float = 1.0

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of its four operands."""
        return (self.A.dtype, self.B.dtype, *self.layer.dtypes)


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A tensor as the sum of what is stored and of deltas.

    Attributes:
        name: its name, for messages.
        shape: rows and columns as they are stored.
        stored: the dtype that is read.
        written: the dtype that the sum is rounded to.
        working: the dtype in which all is added.
        conv1d: whether it is stored as (in, out), so that the transposed delta is added.
        terms: added in this order; none where only the dtype changes.
        decode: where a value is more than its dtype says: makes of rows as they are stored, and the
            number of the first, the same rows in the working dtype.
    """

    name: str
    shape: tuple[int, int]
    stored: np.dtype[Any]
    written: np.dtype[Any]
    working: np.dtype[Any] = FLOAT32
    conv1d: bool = False
    terms: tuple[Term, ...] = ()
    decode: Callable[[Array, int], Array] | None = None

    @property
    def rank(self) -> int:
        """The largest rank of its terms."""
        return max((len(term.A) for term in self.terms), default=1)

    @property
    def block_rows(self) -> int:
        """Rows of a block: blocks are equal but for the last, and each has one row at least."""
        rows, columns = self.shape
        most = max(1, BLOCK_VALUES // max(columns, self.rank, 1))
        blocks = max(1, -(-rows // most))
        return -(-rows // blocks)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a merge did to the values that were looked at; sums over blocks add up.

    Attributes:
        values: how many were looked at.
        changed: how many of them differ afterwards.
        base: sum of the squares of what was stored.
        change: sum of the squares of what was to be added.
        loss: sum of the squares of what rounding made of that, less what it was.
    """

    values: int = 0
    changed: int = 0
    base: float = 0.0
    change: float = 0.0
    loss: float = 0.0

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(
            self.values + other.values,
            self.changed + other.changed,
            self.base + other.base,
            self.change + other.change,
            self.loss + other.loss,
        )


class NotFiniteError(ArithmeticError):
    """A sum is infinite or no number.

    Attributes:
        index: row and column, as stored, of the first such value.
    """

    def __init__(self, index: tuple[int, int]) -> None:
        super().__init__(index)
        self.index = index
