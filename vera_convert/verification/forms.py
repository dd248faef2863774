"""Compare two forms of one adapter: stripped, embedded or migrated.

    trained tensors   the same names, dtypes and bytes
    config            the same fields, except the fields of each form
    A and B           the same values in use: here, and as PEFT loads each form

Each regenerated pair is drawn only once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.repairs import repaired
from vera_convert.adapter.sorting import same_tensor
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BASE_REMEDY, BaseFacts, BaseOptions
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource, check_size, usual_draw
from vera_convert.delta import Array
from vera_convert.draws.generator import rounded, rounding_on_base
from vera_convert.dtypes import BASE_NAMES, USUAL_OF_BASES
from vera_convert.errors import UsageError
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.hub.lookup import HubAccess, Location, fetch_adapter, locate
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.in_effect import InEffect, Origin, in_effect
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.verification.options import VerifyOptions

Matrices = tuple[Array, Array]

_FORM_FIELDS = frozenset(("save_projection", "peft_version", "inference_mode"))
"""The fields in which forms of an adapter may differ."""
_UNORDERED = frozenset(("target_modules", "modules_to_save"))
_CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class FormEffect:
    """Whether two forms use the same A and B on a base loaded in one dtype.

    Attributes:
        dtype: the dtype of the base, in torch's names.
        same: whether both forms use the same A and B in vera-convert.
        same_in_peft: whether both forms use the same A and B in PEFT 0.21 and later.
        difference: the first difference in vera-convert, in words; empty without a difference.
    """

    dtype: str
    same: bool
    same_in_peft: bool
    difference: str = ""


@dataclass(frozen=True, slots=True)
class FormCheck:
    """The result of comparing two forms of an adapter.

    Attributes:
        label: the caller's name of the other form.
        origins: the source of A and B in each form: ``file``, ``fingerprint`` or ``key``.
        tensors: how many trained tensors were compared.
        effects: the comparison of A and B for each dtype of a base.
        findings: errors; then warnings and notes.
    """

    label: str
    origins: tuple[str, str]
    tensors: int
    effects: tuple[FormEffect, ...]
    findings: tuple[Finding, ...]


def check_form(
    adapter: AdapterSpec,
    other: str | Path,
    base: BaseOptions,
    options: VerifyOptions,
    *,
    access: HubAccess,
) -> FormCheck:
    """Compare another form of an adapter with the adapter.

    Args:
        adapter: the adapter; a known old or damaged form is repaired in memory.
        other: the other form, a folder or a repo on the Hub.
        base: the caller's options for the base.
        options: how to verify.
        access: how the Hub is reached.

    Raises:
        CheckpointError: one of the forms is malformed, or does not fit the base.
        UsageError: A and B must be regenerated, and the base is unknown.
        SurroundingsError: a file or a repo is missing, unreadable, or changed meanwhile.
    """
    with ExitStack() as stack:
        first = fetched_adapter(adapter.adapter, access, adapter.revision)
        second = fetched_adapter(other, access, None)
        ours = stack.enter_context(open_adapter(first.fetched, repair=repaired))
        theirs = stack.enter_context(open_adapter(second.fetched))
        bases = Bases(access)
        base_facts, other_facts = (
            resolve_base(each, base, bases=bases, need=Need.HELPFUL) for each in (ours, theirs)
        )
        sides = (
            _Side(ours, theirs, base_facts, options),
            _Side(theirs, ours, other_facts, options),
        )
        effects, origins = _effects(sides)
        wrong = [*_other_tensors(ours, theirs), *_other_fields(ours, theirs)]
        wrong += _other_projections(effects, theirs)
        findings = [*ours.findings, *theirs.findings, *other_facts.findings]
        compared = {tensor.name for tensor in (*ours.trained, *theirs.trained)}
        ours.check_unchanged()
        theirs.check_unchanged()
        return FormCheck(
            label=second.label,
            origins=origins,
            tensors=len(compared),
            effects=effects,
            findings=(*wrong, *dict.fromkeys(findings)),
        )


def fetched_adapter(text: str | Path, access: HubAccess, revision: str | None) -> Location:
    """Find an adapter and fetch every file that the adapter needs."""
    location = locate(str(text), kind="adapter", access=access, revision=revision)
    return fetch_adapter(location, access)


# --- tensors and config --------------------------------------------------------------------------


def _other_tensors(ours: Adapter, theirs: Adapter) -> Iterator[Finding]:
    first = {tensor.name: tensor for tensor in ours.trained}
    second = {tensor.name: tensor for tensor in theirs.trained}
    for names, reason in (
        (first.keys() - second.keys(), "the other form lacks this tensor."),
        (second.keys() - first.keys(), "only the other form has this tensor."),
    ):
        for name in sorted(names):
            yield rules.FORM_TENSOR_MISSING.in_tensor(name, reason)
    for name, tensor in first.items():
        other = second.get(name)
        if other is not None and not same_tensor(tensor, other):
            yield rules.FORM_TENSOR_DIFFERS.in_tensor(name, _tensor_difference(tensor, other))


def _tensor_difference(tensor: TensorData, other: TensorData) -> str:
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return (
            f"the tensor is {tensor.dtype} {list(tensor.shape)}, in the other form "
            f"{other.dtype} {list(other.shape)}."
        )
    return f"{_difference(tensor.array(), other.array()) or 'the bytes differ'}."


def _other_fields(ours: Adapter, theirs: Adapter) -> Iterator[Finding]:
    for field in fields(VeraConfig):
        if field.name in _FORM_FIELDS:
            continue
        values = [getattr(each.config, field.name) for each in (ours, theirs)]
        first, second = (_comparable(field.name, value) for value in values)
        if first is not second and first != second:  # NaN is only identical, never equal
            was, now = (printable(json.dumps(value, ensure_ascii=False)) for value in values)
            reason = f"{field.name} is {was} in the adapter, and {now} in the other form."
            yield rules.FORM_CONFIG_DIFFERS.in_file(CONFIG_NAME, reason)


def _comparable(name: str, value: object) -> object:
    """Return a value of the config in a form that is equal for equivalent values."""
    if name in ("layers_to_transform", "layers_pattern") and value is not None:
        return value if isinstance(value, tuple) else (value,)
    if name in _UNORDERED and isinstance(value, tuple):
        return frozenset(value)
    return value


# --- A and B -------------------------------------------------------------------------------------


class _Side:
    """A form, with the A and B in use; each pair is kept as long as it serves.

    Raises:
        UsageError: the dims of A and B are not known.
    """

    def __init__(
        self, adapter: Adapter, other: Adapter, base_facts: BaseFacts, options: VerifyOptions
    ) -> None:
        """Prepare a form; unknown dims of the base come from the other form, or from this form."""
        self.adapter = adapter
        self._recorded = adapter.projections or adapter.fingerprint
        dims = other.projections or other.fingerprint or self._recorded
        if base_facts.in_features is None and dims is not None:
            base_facts = replace(
                base_facts, in_features=dims.in_features, out_features=dims.out_features
            )
        if None in (base_facts.in_features, base_facts.out_features):
            raise UsageError(
                "the dims of A and B are unknown, because neither form records the dims. "
                f"{BASE_REMEDY}"
            )
        self.base_facts = base_facts
        self.projections = options.projections or ProjectionSource.AUTO
        self.variant = options.generator
        self._here: InEffect | None = None
        self._drawn: Matrices | None = None

    def here(self, dtype: str) -> InEffect:
        """Return the A and B that vera-convert uses on a base in this dtype."""
        needs_dtype = self.projections is ProjectionSource.KEY or self._recorded is None
        if self._here is None or needs_dtype:
            base_facts = replace(self.base_facts, rounding=rounding_on_base(dtype))
            self._here = in_effect(
                self.adapter, base_facts, projections=self.projections, variant=self.variant
            )
        return self._here

    def in_peft(self, dtype: str) -> Matrices:
        """Return the A and B that PEFT 0.21 uses on a base in this dtype."""
        stored = self.adapter.projections
        if stored is not None and self.adapter.config.save_projection:
            return stored.A.array(), stored.B.array()
        drawn = usual_draw(self.adapter.config, self.base_facts, 0, 0)  # the facts have dims
        if self._recorded is None and self.variant is not None:
            drawn = replace(drawn, variant=self.variant)
        if self._drawn is None:
            check_size(drawn, place=self.adapter.place)
            self._drawn = drawn.matrices()
        rounding = drawn.rounded(rounding_on_base(dtype)).rounding
        A, B = (rounded(matrix, rounding) for matrix in self._drawn)
        return A, B


def _effects(
    sides: tuple[_Side, _Side],
) -> tuple[tuple[FormEffect, ...], tuple[Origin, Origin]]:
    """Compare A and B for each possible dtype of the base; return the origins too, ours first."""
    first, second = sides
    dtypes = [dtype for dtype in BASE_NAMES if rounding_on_base(dtype) is first.base_facts.rounding]
    needed = _needed(first)
    effects = []
    for dtype in dtypes or USUAL_OF_BASES:
        ours, theirs = first.here(dtype), second.here(dtype)
        difference = _pairs_differ((ours.A, ours.B), (theirs.A, theirs.B), needed)
        in_peft = _pairs_differ(first.in_peft(dtype), second.in_peft(dtype), needed)
        effects.append(FormEffect(dtype, not difference, not in_peft, difference))
    return tuple(effects), (ours.origin, theirs.origin)


def _needed(side: _Side) -> tuple[int, int]:
    """Return how many columns of A and rows of B the layers use; 0 columns if unknown."""
    match = side.base_facts.match
    widest = max((each.in_features for each in match.layers.values()), default=0) if match else 0
    return widest, side.adapter.longest_b


def _pairs_differ(first: Matrices, second: Matrices, needed: tuple[int, int]) -> str:
    """Return the first difference of two pairs of A and B; empty if layers use the same values.

    Layers use leading slices, so only one of the pairs may be larger.
    """
    columns = min(first[0].shape[1], second[0].shape[1])
    rows = min(first[1].shape[0], second[1].shape[0])
    shapes = [f"{A.shape} and {B.shape}" for A, B in (first, second)]
    if shapes[0] != shapes[1]:
        unequal = f"A and B are {shapes[0]} in one form, {shapes[1]} in the other"
        other_rank = len(first[0]) != len(second[0])
        if other_rank or columns < needed[0] or rows < needed[1]:
            return unequal
        if not needed[0] and first[0].shape[1] != second[0].shape[1]:
            return f"{unequal}; give --base, which tells the columns in use"
        first, second = ((A[:, :columns], B[:rows]) for A, B in (first, second))
    for name, one, other in zip(("vera_A", "vera_B"), first, second, strict=True):
        difference = _difference(one, other)
        if difference:
            return f"{name}: {difference}"
    return ""


def _difference(first: Array, second: Array) -> str:
    """Return the first difference of two arrays of one shape; empty if the arrays are equal.

    Values are compared in every bit, as float64, which holds the values of all dtypes.
    """
    step = max(1, _CHUNK_VALUES * len(first) // max(first.size, 1))
    for start in range(0, len(first), step):
        one = np.ascontiguousarray(first[start : start + step].astype(np.float64))
        other = np.ascontiguousarray(second[start : start + step].astype(np.float64))
        differs = one.view(np.uint64) != other.view(np.uint64)
        if differs.any():
            place = np.unravel_index(int(np.argmax(differs)), differs.shape)
            index = [start + int(place[0]), *map(int, place[1:])]
            return f"the value at {index} is {one[place]} in one form, {other[place]} in the other"
    return ""


def _other_projections(effects: tuple[FormEffect, ...], other: Adapter) -> Iterator[Finding]:
    same = [effect.dtype for effect in effects if effect.same]
    if not same:
        yield rules.FORM_PROJECTIONS_DIFFER.at(other.place, f"{effects[0].difference}.")
        return
    differing = [e.dtype for e in effects if not (e.same and e.same_in_peft)]
    if differing:
        agree = [effect.dtype for effect in effects if effect.dtype not in differing]
        bases = f"on a base in {' or '.join(agree or differing)}"
        reason = (
            f"A and B are the same only {bases}."
            if agree
            else f"with PEFT, A and B differ {bases}."
        )
        yield rules.FORM_PROJECTIONS_DEPEND.at(other.place, reason)
