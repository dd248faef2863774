"""The two vectors of adapted layers, read on demand: all vectors together can be large.

A layer can be some rows of a tensor. The layer's b and B then have zeros in the other rows, so that
the delta of the layer is a delta of the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter.adapter import AdaptedLayer
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorFile


@dataclass(frozen=True, slots=True)
class Vectors:
    """Reads d (r,) and b (out,) of a layer.

    Attributes:
        file: the adapter's weights.
        layer: the layer's tensors.
    """

    file: TensorFile
    layer: AdaptedLayer

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of d and b."""
        return NUMPY_DTYPE[self.layer.lambda_d.dtype], NUMPY_DTYPE[self.layer.lambda_b.dtype]

    def vectors(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return d and b."""
        return self.file.read(self.layer.lambda_d.name), self.file.read(self.layer.lambda_b.name)


@dataclass(frozen=True, slots=True)
class VectorsOfPart:
    """Reads d (r,) and b (rows,) of a layer that is some rows of a tensor.

    Attributes:
        own: reads the layer's own d and b.
        first: the layer's first row in the tensor.
        rows: the rows of the tensor.
    """

    own: Vectors
    first: int
    rows: int

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of d and b."""
        return self.own.dtypes

    def vectors(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return d, and b with zeros for the rows of other layers."""
        d, b = self.own.vectors()
        return d, moved_rows(b, self.first, len(b), self.rows)


def moved_rows(values: NDArray[Any], first: int, count: int, rows: int) -> NDArray[Any]:
    """Return zeros with the first rows of an array in another place.

    Args:
        values: the array, with at least `count` rows.
        first: the new place of row 0.
        count: how many rows are moved.
        rows: the rows of the result.
    """
    moved = np.zeros((rows, *values.shape[1:]), values.dtype)
    moved[first : first + count] = values[:count]
    return moved
