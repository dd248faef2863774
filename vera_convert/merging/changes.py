"""Collect the changes that adapters make to a base: terms to add, and tensors to replace.

This module reads headers and the adapters' small vectors. Of the base's values, the module reads
only the weights that an adapter stores a copy of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.adapter.sorting import same_tensor
from vera_convert.adapter.tensors import AdaptedLayer
from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.match import Match, embedding_of_head
from vera_convert.base.model import BaseModel
from vera_convert.base.replacements import (
    incomplete_modules,
    is_of_classifier,
    match_replacements,
    saved_modules,
)
from vera_convert.base.resizes import NO_RESIZES, Resizes, resizes
from vera_convert.base.vocabulary import shared_embedding
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorData
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.rules import (
    BASE_COPY_DIFFERS,
    EMBEDDING_SHARED,
    HEAD_TIED,
    REPLACEMENT_UNKNOWN,
    REPLACEMENTS_DIFFER,
    Finding,
)
from vera_convert.text import printable

_COMPARED_VALUES = 1 << 20
BASE_COPY = ".base_layer.weight"
_TIED = "the config ties the two."


class Tied(StrEnum):
    """How to merge into an output head that shares one tensor with the embedding."""

    ADD = "add"
    """Change the shared tensor, and so the embedding, as PEFT does."""
    UNTIE = "untie"
    """Give the head a separate tensor, and say so in the config."""


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """A tensor of an adapter that replaces a tensor of the base, or is new."""

    owner: MatchedAdapter
    tensor: TensorData
    info: TensorInfo

    @property
    def start(self) -> int:
        """The position of the first byte in the adapter's file."""
        return self.owner.header.data_start + self.info.start

    @property
    def is_of_classifier(self) -> bool:
        """Whether the tensor belongs to a classifier, and not to an embedding or an output head."""
        return is_of_classifier(self.owner.adapter.config, self.tensor.name)


@dataclass(slots=True, eq=False)
class Changes:
    """All changes to a base, by the names of the tensors.

    Attributes:
        terms: the terms to add, in the order of the adapters.
        conv1d: tensors that are stored as (in, out).
        replaced: tensors of the base that an adapter replaces.
        new: tensors of an adapter that the base lacks.
        heads: names of untied heads, each with the embedding whose values the head starts from.
        unties: whether the config must say that head and embedding are two tensors.
        resizes: the vocabulary and the classifier that the adapters resize.
        findings: warnings.
    """

    terms: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    conv1d: set[str] = field(default_factory=set)
    replaced: dict[str, Replacement] = field(default_factory=dict)
    new: dict[str, Replacement] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    resizes: Resizes = NO_RESIZES
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Reads the two vectors of a layer on demand, because all vectors together can be large."""

    layer: AdaptedLayer

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        return NUMPY_DTYPE[self.layer.lambda_d.dtype], NUMPY_DTYPE[self.layer.lambda_b.dtype]

    def vectors(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.layer.lambda_d.array(), self.layer.lambda_b.array()


def collect(
    adapters: Sequence[MatchedAdapter],
    base: BaseModel,
    files: Mapping[str, InputFile],
    *,
    tied: Tied | None = None,
) -> Changes:
    """Collect the changes of all adapters, and refuse changes that contradict each other.

    Args:
        adapters: the adapters, in the order in which their deltas are added.
        base: the base.
        files: the base's weight files by name.
        tied: how to merge into an output head that shares one tensor with the embedding; None
            refuses such a head.

    Raises:
        CheckpointError: an adapter contradicts the base or another adapter; with all findings.
    """
    changes = Changes()
    defects: list[Finding] = []
    for matched in adapters:
        defects += _add_terms(changes, matched, base, tied)
    for matched in adapters:
        defects += _add_replacements(changes, matched, base, files, tied)
    replacing = {**changes.replaced, **changes.new}
    changes.resizes = resizes(
        {name: each.info.shape for name, each in replacing.items()},
        base,
        heads=[name for name, each in replacing.items() if each.is_of_classifier],
    )
    defects += changes.resizes.findings
    if defects:
        raise CheckpointError.of(defects)
    return changes


# --- what is added -------------------------------------------------------------------------------


def _add_terms(
    changes: Changes, matched: MatchedAdapter, base: BaseModel, tied: Tied | None
) -> Iterator[Finding]:
    for module, layer in matched.adapter.layers.items():
        names = [*_targets(changes, matched.match, module, base, tied)]
        if not names:
            shared = printable(matched.match.tensors[module])
            reason = f'the layer "{printable(module)}" shares {shared} with the embedding.'
            yield HEAD_TIED.at(base.location.label, reason)
        term = Term(matched.pair.A, matched.pair.B, _Vectors(layer), matched.weight)
        for name in names:
            changes.terms[name] = (*changes.terms.get(name, ()), term)
            if module in matched.match.conv1d:
                changes.conv1d.add(name)


def _targets(
    changes: Changes, match: Match, module: str, base: BaseModel, tied: Tied | None
) -> Iterator[str]:
    """Yield the tensors that a layer's delta is added to; none if the caller must choose `tied`."""
    name = match.tensors[module]
    embedding = embedding_of_head(module, match, base)
    if embedding is None:
        yield name
    elif tied is Tied.ADD:
        yield from dict.fromkeys((embedding, name))
    elif tied is Tied.UNTIE:
        changes.unties = True
        head = name
        if module in match.tied:
            head = f"{match.rename(module) or module}.weight"
            changes.heads[head] = embedding
        yield head


# --- what is replaced ----------------------------------------------------------------------------


def _add_replacements(
    changes: Changes,
    matched: MatchedAdapter,
    base: BaseModel,
    files: Mapping[str, InputFile],
    tied: Tied | None,
) -> Iterator[Finding]:
    tensors = {tensor.name: tensor for tensor in matched.adapter.replacements}
    copies = [name for name in tensors if _is_base_copy(name, matched.adapter)]
    for name in copies:
        yield from _compared_with_base(name, matched, base, files)
    names = [name for name in tensors if name not in copies]
    targets = match_replacements(names, matched.match, base)
    # Embeddings come first, because the check of an untied head depends on the embedding.
    for name, target in sorted(targets.items(), key=lambda item: item[1] not in base.tensors):
        replacement = Replacement(matched, tensors[name], matched.header.tensors[name])
        if target in base.tensors:
            yield from _replace(changes, target, replacement, base)
        else:
            yield from _bring(changes, target, replacement, base, tied)
    yield from incomplete_modules(matched.adapter, matched.match, base, targets)


def _is_base_copy(name: str, adapter: Adapter) -> bool:
    """Say whether a tensor is the base weight that PEFT stores for an adapted embedding or head."""
    module = replaced_name(name).rpartition(".")[0]
    return name.endswith(BASE_COPY) and module in adapter.layers


def _compared_with_base(
    name: str, matched: MatchedAdapter, base: BaseModel, files: Mapping[str, InputFile]
) -> Iterator[Finding]:
    """Yield a finding unless a stored base weight equals the base's weight in the base's dtype."""
    info = matched.header.tensors[name]
    module = replaced_name(name).rpartition(".")[0]
    tensor = base.tensors[matched.match.tensors[module]]
    if info.shape != tensor.info.shape:
        reason = (
            f"the stored weight has shape {list(info.shape)}, the base's {list(tensor.info.shape)}."
        )
        yield BASE_COPY_DIFFERS.in_tensor(name, reason)
        return
    stored, own = NUMPY_DTYPE[info.dtype], NUMPY_DTYPE[tensor.info.dtype]
    count = info.nbytes // stored.itemsize
    start = base.files[tensor.file].data_start + tensor.info.start
    with matched.weights.open() as ours, files[tensor.file].open() as theirs:
        for first in range(0, count, _COMPARED_VALUES):
            size = min(_COMPARED_VALUES, count - first)
            at = matched.header.data_start + info.start + first * stored.itemsize
            values = np.frombuffer(ours.read_at(at, size * stored.itemsize), stored)
            raw = theirs.read_at(start + first * own.itemsize, size * own.itemsize)
            if values.astype(own).tobytes() != raw:
                reason = f"the stored values differ from {printable(tensor.info.name)} of the base."
                yield BASE_COPY_DIFFERS.in_tensor(name, reason)
                return


def _replace(
    changes: Changes, target: str, replacement: Replacement, base: BaseModel
) -> Iterator[Finding]:
    """Record that a tensor replaces a tensor of the base."""
    own = base.tensors[target].info
    if target in changes.terms:
        yield REPLACEMENTS_DIFFER.in_tensor(
            target, "one delta is added to this tensor, and one tensor replaces this tensor."
        )
    else:
        yield from _once(changes.replaced, target, replacement)
        if base.tie_word_embeddings and shared_embedding(base, *_matrix(own.shape)) == target:
            finding = EMBEDDING_SHARED.in_tensor(target, _TIED)
            changes.findings.append(finding)


def _shape_in_base(changes: Changes, replacement: Replacement, base: BaseModel) -> tuple[int, ...]:
    """Return a head's shape before the vocabulary was resized, as a replaced embedding tells."""
    shape = replacement.info.shape
    for name, each in changes.replaced.items():
        if is_embedding(name.rpartition(".")[0]) and each.info.shape == shape:
            return base.tensors[name].info.shape
    return shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def _bring(
    changes: Changes,
    target: str,
    replacement: Replacement,
    base: BaseModel,
    tied: Tied | None,
) -> Iterator[Finding]:
    """Record a tensor that the base lacks, or yield a finding if no loader would use the tensor."""
    adapter, name = replacement.owner.adapter, replacement.tensor.name
    module, _, parameter = replaced_name(name).rpartition(".")
    place = printable(target)
    if is_output_head(module) and parameter == "weight" and base.tie_word_embeddings is not False:
        embedding = shared_embedding(base, *_matrix(_shape_in_base(changes, replacement, base)))
        same = changes.replaced.get(embedding or "")
        one = same is not None and same_tensor(same.tensor, replacement.tensor)
        if one or tied is Tied.UNTIE:
            # A loader of the merged model uses the values that the adapter stores for each.
            shared = EMBEDDING_SHARED.in_tensor(embedding or "", _TIED)
            changes.findings = [each for each in changes.findings if each != shared]
        if one:
            return  # the adapter saved one tensor under both names: the two were tied in training
        if tied is Tied.UNTIE:
            changes.unties = True
            yield from _once(changes.new, target, replacement)
        else:
            yield HEAD_TIED.at(place, "the adapter stores a head of its own (to be untied).")
        return
    if not saved_modules(adapter.config).of(module):
        yield REPLACEMENT_UNKNOWN.at(place, f"{printable(name)} would replace it.")
        return
    yield from _once(changes.new, target, replacement)


def _once(
    taken: dict[str, Replacement], target: str, replacement: Replacement
) -> Iterator[Finding]:
    """Record a replacement, or yield a finding if another adapter has other values."""
    first = taken.setdefault(target, replacement)
    if first is not replacement and not same_tensor(first.tensor, replacement.tensor):
        reason = (
            f"{first.owner.label} and {replacement.owner.label} replace this tensor by different "
            "values."
        )
        yield REPLACEMENTS_DIFFER.in_tensor(target, reason)
