"""Report the effect of a merge on each tensor in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from vera_convert.assembly.addends import Numbers
from vera_convert.rules import DELTA_LOST, UNTRAINED, Finding
from vera_convert.text import printable

LOSS_LIMIT = 0.5
"""The relative loss by rounding above which a merge warns."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor that adapters change.

    Attributes:
        name: the tensor's name.
        dtype: the dtype in the merged model, in safetensors' names.
        shape: the tensor's shape.
        adapters: indexes of the adapters that change the tensor, from 0.
        kind: ``added``, ``replaced``, ``new`` or ``converted``.
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
        found: dict[str, object] = {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "adapters": list(self.adapters),
            "kind": self.kind,
        }
        return found | (numbers_record(self.numbers) if self.numbers is not None else {})


def numbers_record(numbers: Numbers) -> dict[str, object]:
    """Return numbers as members of a JSON object, with four significant digits."""
    return {
        "looked_at": numbers.values,
        "changed": _short(changed_share(numbers)),
        "relative_change": _short(relative_change(numbers)),
        "relative_loss": _short(relative_loss(numbers)),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def changed_share(numbers: Numbers) -> float:
    """Return the share of the values that the merge changes."""
    return numbers.changed / numbers.values if numbers.values else 0.0


def relative_change(numbers: Numbers) -> float:
    """Return the norm of the added values relative to the norm of the base (Frobenius norms).

    For a base of zeros, return 1 if a value was added, else 0.
    """
    if numbers.base == 0:
        return 1.0 if numbers.change else 0.0
    return math.sqrt(numbers.change / numbers.base)


def relative_loss(numbers: Numbers) -> float:
    """Return the norm of the rounding errors relative to the norm of the added values."""
    return math.sqrt(numbers.loss / numbers.change) if numbers.change else 0.0


def total(reports: Sequence[TensorReport]) -> Numbers:
    """Return the numbers of all tensors together."""
    return reduce(add, (each.numbers for each in _added(reports) if each.numbers), Numbers())


def _added(reports: Sequence[TensorReport]) -> list[TensorReport]:
    """Return the tensors to which deltas were added."""
    return [each for each in reports if each.kind == "added" and each.numbers is not None]


def worst(reports: Sequence[TensorReport]) -> TensorReport | None:
    """Return the tensor with the largest relative loss."""
    return max(
        _added(reports), key=lambda each: relative_loss(each.numbers or Numbers()), default=None
    )


def number_findings(reports: Sequence[TensorReport], *, place: str) -> Iterator[Finding]:
    """Yield a warning if all deltas are zero, or if rounding loses most of a delta."""
    everything, last = total(reports), worst(reports)
    if last is None or last.numbers is None:
        return
    if everything.values and not everything.change:
        yield UNTRAINED.at(place, f"all {everything.values:,} sampled values stay the same.")
    elif relative_loss(last.numbers) > LOSS_LIMIT:
        count = sum(
            relative_loss(each.numbers or Numbers()) > LOSS_LIMIT for each in _added(reports)
        )
        reason = (
            f"in {count:,} of {len(reports):,} tensors; of all values "
            f"{1 - changed_share(everything):.1%} stay as they were. The worst is "
            f"{printable(last.name)}, which loses {relative_loss(last.numbers):.0%} of its delta."
        )
        yield DELTA_LOST.at(place, reason)
