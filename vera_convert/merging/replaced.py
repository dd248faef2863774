"""What a merge takes from an adapter as a whole: which tensors, and how much they change.

Values are compared in blocks, so memory does not depend on the size of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vera_convert.assembly.addends import Array, Numbers
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel
from vera_convert.dtypes import FLOATS
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.changes import Changes, Replacement
from vera_convert.merging.report import relative_change
from vera_convert.rules import REPLACED_BY_CONSTANT, Finding
from vera_convert.text import printable

_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class ReplacedTensor:
    """One tensor of the merged model that is the adapter's own.

    Attributes:
        name: its name in the merged model.
        adapter: how the caller named the adapter.
        shape: its shape.
        base_shape: its shape in the base; None if the base has no such tensor.
        numbers: how its values differ from the base's; None if they cannot be compared.
        constant: the one value that all its values have; None if they differ.
    """

    name: str
    adapter: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    numbers: Numbers | None
    constant: float | None

    @property
    def change(self) -> str:
        """How much it changes, in words."""
        if self.base_shape is None:
            return "new: the base has no such tensor"
        sizes = "" if self.shape == self.base_shape else f"{_by(self.base_shape)} becomes "
        sizes += "" if self.shape == self.base_shape else _by(self.shape)
        if self.numbers is None:
            return sizes or "replaced"
        if not self.numbers.changed:
            return "the base's own values"
        change = f"changes by {relative_change(self.numbers):.3g} of its norm"
        constant = "" if self.constant is None else f", all values are {self.constant:g}"
        return (f"{sizes}; the rest {change}" if sizes else change) + constant

    def record(self) -> dict[str, object]:
        """Return it as a JSON object."""
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
    """Return every tensor that is taken from an adapter, compared with the base's.

    Args:
        changes: what the adapters do to the base.
        base: the base.
        files: its weight files, by name; they are read only where they are on this machine.
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
    """Yield a warning for each tensor whose values an adapter replaces by a single one."""
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
    """Compare the values that both tensors have: all, or the rows of the shorter one."""
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
    """Yield the first `count` values of a tensor in blocks, each with the number of its first."""
    dtype = NUMPY_DTYPE[replacement.info.dtype]
    with replacement.owner.weights.open() as source:
        for first in range(0, count, _BLOCK_VALUES):
            size = min(_BLOCK_VALUES, count - first)
            at = replacement.start + first * dtype.itemsize
            yield first, np.frombuffer(source.read_at(at, size * dtype.itemsize), dtype)


def _constant(replacement: Replacement) -> float | None:
    """Return the value that all values of a tensor have; None if they differ, or if it is empty."""
    if replacement.info.dtype not in FLOATS:
        return None
    found: float | None = None
    for _, block in _blocks(replacement, math.prod(replacement.info.shape)):
        found = float(block[0]) if found is None else found
        if not (block == block.dtype.type(found)).all():
            return None
    return found


def _by(shape: tuple[int, ...]) -> str:
    return " by ".join(f"{size:,}" for size in shape) or "a single value"
