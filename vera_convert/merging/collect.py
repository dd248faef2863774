"""Collect the changes that adapters make to a base.

This module reads headers and the adapters' small vectors. Of the base's values, the module reads
only the weights that an adapter stores a copy of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.adapter.tensors import AdaptedLayer
from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.match import Match, embedding_of_head
from vera_convert.base.model import BaseModel
from vera_convert.base.replacements import (
    incomplete_modules,
    match_replacements,
    saved_modules,
)
from vera_convert.base.resizes import resizes
from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.merging.changes import BASE_COPY, Changes, Replacement, Tied
from vera_convert.merging.tied_heads import is_head, record_once, replace_head, split_pairs
from vera_convert.rules import (
    BASE_COPY_DIFFERS,
    EMBEDDING_UNUSED,
    HEAD_TIED,
    REPLACEMENT_UNKNOWN,
    REPLACEMENTS_DIFFER,
    Finding,
)
from vera_convert.text import printable

_COMPARED_VALUES = 1 << 20


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
    for matched in adapters:
        defects += split_pairs(changes, matched, base, tied)
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
    shapes = {name: each.shape for name, each in tensors.items() if name not in copies}
    matched_parts = match_replacements(shapes, matched.match, base)
    parts = {part.target: (name, part) for name, found in matched_parts.items() for part in found}
    # Embeddings come first, because the check of an untied head depends on the embedding.
    for target, (name, part) in sorted(parts.items(), key=lambda item: is_head(item[0])):
        replacement = Replacement.of(matched, tensors[name], part)
        if _is_unused(name, matched.adapter):
            reason = "the merged model keeps the base's values."
            changes.findings.append(EMBEDDING_UNUSED.in_tensor(name, reason))
        elif target in base.tensors:
            yield from _replace(changes, target, replacement, base, tied)
        else:
            yield from _bring(changes, target, replacement, base, tied)
    yield from incomplete_modules(matched.adapter, matched.match, base, parts)


def _is_unused(name: str, adapter: Adapter) -> bool:
    """Say whether a tensor is the copy of an encoder-decoder's `shared`, which no layer reads.

    The encoder and the decoder have embeddings of their own, and PEFT wraps only `shared`.
    """
    module = replaced_name(name).rpartition(".")[0]
    is_shared = module.rpartition(".")[2] == "shared"
    return is_shared and bool(saved_modules(adapter.config).of(module))


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
    changes: Changes,
    target: str,
    replacement: Replacement,
    base: BaseModel,
    tied: Tied | None,
) -> Iterator[Finding]:
    """Record that a tensor replaces a tensor of the base."""
    if target in changes.terms:
        yield REPLACEMENTS_DIFFER.in_tensor(
            target, "one delta is added to this tensor, and one tensor replaces this tensor."
        )
    elif base.tie_word_embeddings and is_head(target):
        yield from replace_head(changes, target, replacement, base, tied)
    else:
        yield from record_once(changes.replaced, target, replacement)


def _bring(
    changes: Changes,
    target: str,
    replacement: Replacement,
    base: BaseModel,
    tied: Tied | None,
) -> Iterator[Finding]:
    """Record a tensor that the base lacks, or yield a finding if no loader would use the tensor."""
    adapter, name = replacement.owner.adapter, replacement.tensor.name
    module = replaced_name(name).rpartition(".")[0]
    if is_head(replaced_name(name)) and base.tie_word_embeddings is not False:
        yield from replace_head(changes, target, replacement, base, tied)
    elif not saved_modules(adapter.config).of(module):
        yield REPLACEMENT_UNKNOWN.at(printable(target), f"{printable(name)} would replace it.")
    elif "experts" in module.split("."):
        reason = f"the base stores the experts of {printable(name)} in another form."
        yield REPLACEMENT_UNKNOWN.at(printable(target), reason)
    else:
        yield from record_once(changes.new, target, replacement)
