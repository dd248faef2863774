"""Report the effect of a merge on each tensor: the deltas, the rounding, the replaced tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vera_convert import rules
from vera_convert.assembly.addends import Numbers
from vera_convert.assembly.input_files import StoredTensor
from vera_convert.base.resizes import shape_text
from vera_convert.dtypes import FLOATS
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Changes, Replacement
from vera_convert.merging.inputs import MergeInputs
from vera_convert.rules import Finding
from vera_convert.text import printable

LOSS_LIMIT = 0.5
"""The relative loss by rounding above which a merge warns."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """A tensor that adapters change.

    Attributes:
        name: the tensor's name.
        dtype: the dtype in the merged model, in safetensors' names.
        shape: the tensor's shape.
        adapters: indexes of the adapters that change the tensor, from 0.
        kind: ``added``, ``replaced`` or ``new``.
        numbers: the changes of the checked values; None if no value was added or compared.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    adapters: tuple[int, ...]
    kind: str
    numbers: Numbers | None = None

    def record(self) -> dict[str, object]:
        """Return the tensor as a JSON object."""
        found = asdict(self)
        del found["numbers"]
        return found | (self.numbers.record() if self.numbers is not None else {})


def total(reports: Sequence[TensorReport]) -> Numbers:
    """Return the numbers of all tensors together."""
    return sum(_added(reports).values(), Numbers())


def worst(reports: Sequence[TensorReport]) -> tuple[str, Numbers] | None:
    """Return name and numbers of the tensor with the largest relative loss."""
    added = _added(reports).items()
    return max(added, key=lambda item: item[1].relative_loss, default=None)


def values_in_words(reports: Sequence[TensorReport]) -> str:
    """Return how many values the numbers are taken from, and whether these are all values."""
    looked_at, added = total(reports).values, _added(reports)
    every = sum(math.prod(each.shape) for each in reports if each.name in added)
    return f"all {looked_at:,} values" if looked_at == every else f"{looked_at:,} sampled values"


def _added(reports: Sequence[TensorReport]) -> dict[str, Numbers]:
    """Return the numbers of the tensors to which deltas were added, by name."""
    return {
        each.name: each.numbers
        for each in reports
        if each.kind == "added" and each.numbers is not None
    }


def number_findings(
    reports: Sequence[TensorReport], weights: Iterable[float], *, place: str
) -> Iterator[Finding]:
    """Yield a warning if all deltas are zero, or if rounding loses most of a delta.

    Args:
        reports: the merged tensors.
        weights: the factor of each adapter's delta.
        place: the base, for people.
    """
    everything, last = total(reports), worst(reports)
    if last is None:
        return
    name, numbers = last
    if everything.values and not everything.change:
        said = values_in_words(reports).removeprefix("all ")
        yield _without_effect(f"the delta is 0 at all {said}", [*filter(None, weights)], place)
    elif numbers.relative_loss > LOSS_LIMIT:
        count = sum(each.relative_loss > LOSS_LIMIT for each in _added(reports).values())
        reason = (
            f"rounding loses more than half of the delta in {count:,} of {len(reports):,} tensors; "
            f"{1 - everything.changed_share:.1%} of all values stay as they were. The worst is "
            f"{printable(name)}, which loses {numbers.relative_loss:.0%} of its delta."
        )
        yield rules.DELTA_LOST.at(place, reason)


def _without_effect(said: str, weights: Sequence[float], place: str) -> Finding:
    """Return the warning about a delta of 0, with the remedy for the weights other than 0."""
    if not weights:
        reason = f"{said}, because the weight of every adapter is 0."
        remedy = "Give another weight with --weight, or with --add ADAPTER=W."
        return rules.UNTRAINED.at(place, reason).with_remedy(remedy)
    found = rules.UNTRAINED.at(place, f"{said}.")
    if len(weights) == 1:
        return found
    return found.with_remedy("Check the adapters and their weights: deltas can cancel each other.")


# --- replaced tensors ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplacedTensor:
    """A tensor of the merged model from an adapter.

    Attributes:
        name: the name in the merged model.
        adapter: the name that the caller gave the adapter.
        shape: the shape in the merged model.
        base_shape: the shape in the base; None if the base has no such tensor.
        numbers: the differences from the base's values; None if the values cannot be compared.
        constant: the common value of all elements; None if the elements differ.
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
        change = f"changes by {self.numbers.relative_change:.3g} times its norm"
        if not self.numbers.base:
            change = "changes from zeros"
        constant = "" if self.constant is None else f", all values are {self.constant:g}"
        return (f"{sizes}; the rest {change}" if sizes else change) + constant


def replaced_tensors(inputs: MergeInputs, changes: Changes) -> tuple[ReplacedTensor, ...]:
    """Return every tensor that comes from an adapter, compared with the base's tensor.

    Values are compared only with a base on this machine.
    """
    base = inputs.base
    places: list[tuple[str, Replacement, StoredTensor | None]] = [
        (name, each, base.tensor(name) if name in changes.replaced else None)
        for name, each in changes.replacing.items()
    ]
    places += [
        (name, each, rows.base_of(first))
        for name, rows in changes.rows.items()
        for first, each in sorted(rows.parts.items())
    ]
    return tuple(
        ReplacedTensor(
            name,
            each.owner.label,
            each.stored.shape,
            None if old is None else old.shape,
            None if old is None else _numbers(old, each, base),
            _constant(each.stored),
        )
        for name, each, old in sorted(places, key=lambda place: place[0])
    )


def constant_findings(tensors: tuple[ReplacedTensor, ...]) -> Iterator[Finding]:
    """Yield a warning for each tensor that an adapter replaces by a constant."""
    for tensor in tensors:
        is_new_matrix = tensor.base_shape is None and len(tensor.shape) > 1
        is_changed = tensor.numbers is not None and tensor.numbers.changed > 0
        count = math.prod(tensor.shape)
        if tensor.constant is not None and count > 1 and (is_changed or is_new_matrix):
            reason = f"all {count:,} values of {printable(tensor.adapter)} are {tensor.constant:g}."
            yield rules.REPLACED_BY_CONSTANT.in_tensor(tensor.name, reason)


def _numbers(old: StoredTensor, replacement: Replacement, base: BaseFiles) -> Numbers | None:
    """Compare the values that both tensors have: all values, or the rows of the shorter tensor.

    Return None if the values cannot be compared.
    """
    new = replacement.stored
    is_resized = new.shape != old.shape
    if new.shape[1:] != old.shape[1:] or (is_resized and replacement.is_of_classifier):
        return None
    if not base.has_values or not {old.dtype, new.dtype} <= {*FLOATS}:
        return None
    count, dtype, total = min(new.count, old.count), NUMPY_DTYPE[old.dtype], Numbers()
    for ours, theirs in zip(new.blocks(count), old.blocks(count), strict=True):
        before = theirs.astype(np.float64)
        change = ours.astype(np.float64) - before
        changed = int((ours.astype(dtype) != theirs).sum())
        squares = float(np.square(before).sum()), float(np.square(change).sum())
        total += Numbers(ours.size, changed, *squares)
    return total


def _constant(tensor: StoredTensor) -> float | None:
    """Return the value that all elements have; None if the elements differ or there are none."""
    if tensor.dtype not in FLOATS:
        return None
    found: float | None = None
    for block in tensor.blocks():
        found = float(block[0]) if found is None else found
        if not (block == block.dtype.type(found)).all():
            return None
    return found
