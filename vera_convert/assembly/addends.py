"""A merged tensor as data: the stored values, the deltas to add, and statistics of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from operator import add
from typing import Any

import numpy as np

from vera_convert.delta import FLOAT32, Array
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorData

BLOCK_VALUES = 1 << 21
"""Values in a block. Blocks of half the size cost 3 % of speed, because the BLAS packs A once for
each block. Blocks of twice the size would gain 1 %."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """The delta that one adapter adds to one tensor.

    Attributes:
        A: (r, in or more), in any float dtype.
        B: (out or more, r).
        d: (r,), read on demand: the vectors of all layers together can be large.
        b: (out,), likewise.
        weight: the factor of the whole delta.
        rows: the rows of the tensor that are the adapted layer; None if the layer is the whole
            tensor. The merged model has all other rows bit for bit.
    """

    A: Array
    B: Array
    d: TensorData
    b: TensorData
    weight: float = 1.0
    rows: slice | None = None

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of the four operands."""
        return self.A.dtype, self.B.dtype, NUMPY_DTYPE[self.d.dtype], NUMPY_DTYPE[self.b.dtype]

    def vectors(self) -> tuple[Array, Array]:
        """Return d and b in the stored dtypes."""
        return self.d.array(), self.b.array()

    def overlap(self, block: slice) -> tuple[slice, slice]:
        """Return the rows of a block that are the layer's, and the rows of B and b for these.

        Args:
            block: rows of the tensor; the first result counts from the first of these.
        """
        if self.rows is None:
            return slice(0, block.stop - block.start), block
        first = max(block.start, self.rows.start)
        last = max(first, min(block.stop, self.rows.stop))
        in_block, in_layer = (
            slice(first - start, last - start) for start in (block.start, self.rows.start)
        )
        return in_block, in_layer


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A tensor as the sum of stored values and deltas.

    Attributes:
        name: the tensor's name, for messages.
        shape: rows and columns as stored.
        stored: the dtype in the input.
        written: the dtype in the output, to which the sum is rounded.
        working: the dtype of the addition.
        conv1d: whether the tensor is stored as (in, out), so the delta is transposed.
        terms: added in this order; empty if only the dtype changes.
        decode: reads and computes the rows `first` to `last` (not included) of a packed weight or
            of a resized bias; None for plain values.
    """

    name: str
    shape: tuple[int, int]
    stored: np.dtype[Any]
    written: np.dtype[Any]
    working: np.dtype[Any] = FLOAT32
    conv1d: bool = False
    terms: tuple[Term, ...] = ()
    decode: Callable[[int, int], Array] | None = None

    @property
    def rank(self) -> int:
        """The largest rank of the terms."""
        return max((len(term.A) for term in self.terms), default=1)

    @property
    def block_rows(self) -> int:
        """The rows of a block, at least 1. All blocks but the last have the same number of rows."""
        rows, columns = self.shape
        most = max(1, BLOCK_VALUES // max(columns, self.rank, 1))
        blocks = max(1, -(-rows // most))
        return -(-rows // blocks)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Statistics of the sampled values of a merged tensor. The statistics of blocks can be added.

    Attributes:
        values: the number of sampled values.
        changed: the number of sampled values that the merge changed.
        base: the sum of the squares of the stored values.
        change: the sum of the squares of the delta.
        loss: the sum of the squares of the rounding errors of the delta.
    """

    values: int = 0
    changed: int = 0
    base: float = 0.0
    change: float = 0.0
    loss: float = 0.0

    @property
    def changed_share(self) -> float:
        """The share of the values that the merge changes."""
        return self.changed / self.values if self.values else 0.0

    @property
    def relative_change(self) -> float:
        """The norm of the delta relative to the norm of the base (Frobenius norms).

        For a base of zeros, the relative change is 1 if a value was added, else 0.
        """
        if self.base == 0:
            return 1.0 if self.change else 0.0
        return math.sqrt(self.change / self.base)

    @property
    def relative_loss(self) -> float:
        """The norm of the rounding errors relative to the norm of the delta."""
        return math.sqrt(self.loss / self.change) if self.change else 0.0

    def record(self) -> dict[str, object]:
        """Return the numbers as members of a JSON object."""
        return {
            "looked_at": self.values,
            "changed": four_digits(self.changed_share),
            "relative_change": four_digits(self.relative_change),
            "relative_loss": four_digits(self.relative_loss),
        }

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(*map(add, astuple(self), astuple(other)))


def four_digits(value: float) -> float:
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


class NotFiniteError(ArithmeticError):
    """A value of a merged tensor is infinite or NaN.

    Attributes:
        tensor: the sum.
        index: row and column of the first such value, as stored.
    """

    def __init__(self, tensor: Sum, index: tuple[int, int]) -> None:
        super().__init__(tensor.name, index)
        self.tensor = tensor
        self.index = index
