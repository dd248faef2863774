"""Packed layers in memory, with the readers that a merge uses for files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.base.quantized.layer import Layer, PackedWeight
from vera_convert.files.header import TensorInfo
from vera_convert.files.tensorfile import NUMPY_DTYPE

Array = NDArray[Any]
NAMES = {dtype: name for name, dtype in NUMPY_DTYPE.items()}


@dataclass(frozen=True)
class Memory:
    """Read ranges of arrays, as a merge reads ranges of files."""

    arrays: Mapping[str, Array]

    def rows(self, name: str, first: int, last: int) -> Array:
        return self.arrays[name][first:last].copy()

    def columns(self, name: str, first: int, last: int) -> Array:
        return self.arrays[name][:, first:last].copy()

    def flat(self, name: str, first: int, last: int) -> Array:
        return self.arrays[name].reshape(-1)[first:last].copy()

    def raw(self, name: str, first: int, last: int) -> NDArray[np.uint8]:
        return self.arrays[name].reshape(-1).view(np.uint8)[first:last].copy()


def layer_of(
    arrays: Mapping[str, Array],
    settings: Mapping[str, object] | None = None,
    *,
    dtype: str = "BF16",
    metadata: str | None = None,
) -> Layer:
    """Return a layer with these tensors."""
    infos = {
        name: TensorInfo(f"m.{name}", NAMES[array.dtype], array.shape, 0, array.nbytes)
        for name, array in arrays.items()
    }
    small = {name: array.tobytes() for name, array in arrays.items() if array.nbytes < 4096}
    return Layer("m", infos, settings or {}, dtype, small, metadata, "a format")


def decoded(
    weights: Callable[[Layer], Iterator[PackedWeight]],
    arrays: Mapping[str, Array],
    settings: Mapping[str, object] | None = None,
    **more: Any,
) -> Array:
    """Return all rows of the layer's weight; check that blocks of any size give the same bits."""
    (weight,) = weights(layer_of(arrays, settings, **more))
    read = Memory({f"m.{name}": array for name, array in arrays.items()})
    for name, check in weight.checks.items():
        assert check(read.arrays[name]) is None
    rows, columns = weight.matrix
    with np.errstate(all="ignore"):
        whole = weight.decode(read, 0, rows)
    assert whole.shape == (rows, columns)
    for step in (1, 3, 7):
        for first in range(0, rows, step):
            last = min(first + step, rows)
            with np.errstate(all="ignore"):
                part = weight.decode(read, first, last)
            assert part.dtype == whole.dtype
            assert part.tobytes() == whole[first:last].tobytes()
    return whole
