"""Measure the tensors that an adapter replaces: how much each differs from the base's tensor.

Values are compared in blocks, so that memory does not depend on the size of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vera_convert.assembly.addends import Array, Numbers
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel
from vera_convert.base.resizes import shape_text
from vera_convert.dtypes import FLOATS
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.changes import Changes, Replacement
from vera_convert.merging.report import relative_change
from vera_convert.rules import REPLACED_BY_CONSTANT, Finding
from vera_convert.text import printable

_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class ReplacedTensor:
    """One tensor of the merged model that comes from an adapter.

    Attributes:
        name: the name in the merged model.
        adapter: the name that the caller gave the adapter.
        shape: the shape in the merged model.
        base_shape: the shape in the base; None if the base has no such tensor.
        numbers: the differences from the base's values; None if the values cannot be compared.
        constant: the value that all elements have; None if the elements differ.
    """

    name: str
    adapter: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    numbers: Numbers | None
    constant: float | None

    @property
    def change(self) -> str:
        """The size of the change, in words."""
        if self.base_shape is None:
            return "new: the base has no such tensor"
        sizes = "" if self.shape == self.base_shape else f"{shape_text(self.base_shape)} becomes "
        sizes += "" if self.shape == self.base_shape else shape_text(self.shape)
        if self.numbers is None:
            return sizes or "replaced"
        if not self.numbers.changed:
            return "the base's own values"
        change = f"changes by {relative_change(self.numbers):.3g} times its norm"
        if not self.numbers.base:
            change = "changes from zeros"
        constant = "" if self.constant is None else f", all values are {self.constant:g}"
        return (f"{sizes}; the rest {change}" if sizes else change) + constant

    def record(self) -> dict[str, object]:
        """Return the tensor as a JSON object."""
        change = None if self.numbers is None else float(f"{relative_change(self.numbers):.4g}")
        return {
            "name": self.name,
            "adapter": self.adapter,
            "shape": list(self.shape),
            "base_shape": None if self.base_shape is None else list(self.base_shape),
            "relative_change": change,
            "constant": self.constant,
        }


def replaced_tensors(
    changes: Changes, base: BaseModel, files: Mapping[str, InputFile]
) -> tuple[ReplacedTensor, ...]:
    """Return every tensor that comes from an adapter, compared with the base's tensor.

    Args:
        changes: the changes to the base.
        base: the base.
        files: the base's weight files by name, read only if the base is on this machine.
    """
    replaced = [
        _compared(name, replacement, base, files) for name, replacement in changes.replaced.items()
    ]
    new = [
        ReplacedTensor(name, each.owner.label, each.info.shape, None, None, _constant(each))
        for name, each in changes.new.items()
    ]
    return tuple(sorted((*replaced, *new), key=lambda tensor: tensor.name))


def constant_findings(tensors: tuple[ReplacedTensor, ...]) -> Iterator[Finding]:
    """Yield a warning for each tensor that an adapter replaces by a constant."""
    for tensor in tensors:
        is_new_matrix = tensor.base_shape is None and len(tensor.shape) > 1
        is_changed = tensor.numbers is not None and tensor.numbers.changed > 0
        count = math.prod(tensor.shape)
        if tensor.constant is not None and count > 1 and (is_changed or is_new_matrix):
            reason = f"all {count:,} values of {printable(tensor.adapter)} are {tensor.constant:g}."
            yield REPLACED_BY_CONSTANT.in_tensor(tensor.name, reason)


def _compared(
    name: str, replacement: Replacement, base: BaseModel, files: Mapping[str, InputFile]
) -> ReplacedTensor:
    tensor = base.tensors[name]
    shape, own = replacement.info.shape, tensor.info.shape
    is_comparable = shape[1:] == own[1:] and not (shape != own and replacement.is_of_classifier)
    is_here = base.location.folder is not None
    numbers = None
    if is_here and is_comparable and {tensor.info.dtype, replacement.info.dtype} <= {*FLOATS}:
        numbers = _numbers(replacement, base, files[tensor.file], name)
    constant = _constant(replacement)
    return ReplacedTensor(name, replacement.owner.label, shape, own, numbers, constant)


def _numbers(replacement: Replacement, base: BaseModel, file: InputFile, name: str) -> Numbers:
    """Compare the values that both tensors have: all values, or the rows of the shorter tensor."""
    tensor = base.tensors[name]
    own = NUMPY_DTYPE[tensor.info.dtype]
    start = base.files[tensor.file].data_start + tensor.info.start
    count = min(math.prod(tensor.info.shape), math.prod(replacement.info.shape))
    total = Numbers()
    with file.open() as source:
        for first, ours in _blocks(replacement, count):
            raw = source.read_at(start + first * own.itemsize, ours.size * own.itemsize)
            theirs = np.frombuffer(raw, own)
            change = ours.astype(np.float64) - theirs.astype(np.float64)
            before = np.square(theirs.astype(np.float64)).sum()
            changed = int((ours.astype(own) != theirs).sum())
            total += Numbers(ours.size, changed, float(before), float(np.square(change).sum()))
    return total


def _blocks(replacement: Replacement, count: int) -> Iterator[tuple[int, Array]]:
    """Yield the first `count` values of a tensor in blocks, each with the block's position."""
    dtype = NUMPY_DTYPE[replacement.info.dtype]
    with replacement.owner.weights.open() as source:
        for first in range(0, count, _BLOCK_VALUES):
            size = min(_BLOCK_VALUES, count - first)
            at = replacement.start + first * dtype.itemsize
            yield first, np.frombuffer(source.read_at(at, size * dtype.itemsize), dtype)


def _constant(replacement: Replacement) -> float | None:
    """Return the value that all elements have; None if the elements differ or there are none."""
    if replacement.info.dtype not in FLOATS:
        return None
    found: float | None = None
    for _, block in _blocks(replacement, math.prod(replacement.info.shape)):
        found = float(block[0]) if found is None else found
        if not (block == block.dtype.type(found)).all():
            return None
    return found
