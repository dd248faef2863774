"""Replace an embedding, or an output head, if the base ties the two."""

from __future__ import annotations

from collections.abc import Iterator

from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.adapter.sorting import same_tensor
from vera_convert.base.model import BaseModel
from vera_convert.base.replacements import (
    saved_modules,
)
from vera_convert.base.resizes import shape_differs
from vera_convert.base.task_classes import class_of_head
from vera_convert.base.vocabulary import shared_embedding
from vera_convert.embeddings import is_embedding, is_output_head, output_head_of
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.merging.changes import Changes, Replacement, Tied
from vera_convert.rules import (
    EMBEDDING_SHARED,
    HEAD_TIED,
    REPLACEMENTS_DIFFER,
    Finding,
)
from vera_convert.text import printable


def is_head(target: str) -> bool:
    """Say whether a tensor is the weight of an output head."""
    module, _, parameter = target.rpartition(".")
    return is_output_head(module) and parameter == "weight"


def record_once(
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


def replace_head(
    changes: Changes,
    target: str,
    replacement: Replacement,
    base: BaseModel,
    tied: Tied | None,
) -> Iterator[Finding]:
    """Record a head in place of a head that the base ties to the embedding."""
    embedding = shared_embedding(base, *_matrix(_shape_in_base(changes, replacement, base)))
    same = changes.replaced.get(embedding or "")
    if same is not None and same_tensor(same.tensor, replacement.tensor):
        # The adapter saved one tensor under both names: the two were tied in training.
        if target in base.tensors:
            yield from record_once(changes.replaced, target, replacement)
    elif target in changes.terms:
        yield REPLACEMENTS_DIFFER.in_tensor(
            target, "one delta is added to this tensor, and one tensor replaces this tensor."
        )
    elif tied is Tied.UNTIE:
        changes.unties = True
        taken = changes.replaced if target in base.tensors else changes.new
        yield from record_once(taken, target, replacement)
    else:
        yield HEAD_TIED.at(
            printable(target), "the adapter stores a head of its own (to be untied)."
        )


def split_pairs(
    changes: Changes, matched: MatchedAdapter, base: BaseModel, tied: Tied | None
) -> Iterator[Finding]:
    """Keep the base's head if the adapter replaces only the embedding that the head shares.

    PEFT trains a copy of each module in modules_to_save, and the head keeps the base's values. An
    embedding that PEFT saved for another reason is loaded into the tensor that both share.
    """
    saved = saved_modules(matched.adapter.config)
    for embedding, replacement in [*changes.replaced.items()]:
        module = replaced_name(replacement.tensor.name).rpartition(".")[0]
        own = base.tensors[embedding].info.shape
        is_copy = replacement.owner is matched and saved.of(module)
        if not is_copy or shared_embedding(base, *_matrix(own)) != embedding:
            continue
        head = _head_sharing(embedding, matched, base)
        replaced = {**changes.new, **changes.replaced}
        if head is None or head in replaced or _is_saved_twice(replacement, matched):
            continue
        if tied is None:
            reason = f"the adapter replaces {printable(embedding)} alone, and PEFT keeps the head."
            yield HEAD_TIED.at(printable(head), reason)
        elif tied is Tied.ADD:
            reason = f"--tied add also makes it the output head {printable(head)}."
            changes.findings.append(EMBEDDING_SHARED.in_tensor(embedding, reason))
            if head in base.tensors:
                changes.replaced[head] = replacement
        elif replacement.info.shape != own:
            more = ", and the adapter stores no output head of the new size"
            yield shape_differs(embedding, replacement.info.shape, base, more)
        elif head not in base.tensors and "auto_map" in base.config:
            reason = "the base's class has code of its own, which may name the head otherwise."
            yield HEAD_TIED.at(printable(head), reason)
        else:
            changes.unties = True
            if head not in base.tensors:
                changes.heads[head] = embedding


def _head_sharing(embedding: str, matched: MatchedAdapter, base: BaseModel) -> str | None:
    """Return the name of the head that shares an embedding's tensor; None if there is none."""
    if base.tie_word_embeddings is False:
        return None
    shape = base.tensors[embedding].info.shape
    stored = (
        name
        for name, tensor in base.tensors.items()
        if is_head(name) and tensor.info.shape == shape
    )
    head = next(stored, None)
    if head is not None:
        return head if base.tie_word_embeddings else None
    named = base.config.get("architectures")
    name = class_of_head(matched.adapter.config, base) or (
        named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    )
    path = output_head_of(base.model_type, name)
    return None if path is None else f"{matched.match.rename(path) or path}.weight"


def _is_saved_twice(replacement: Replacement, matched: MatchedAdapter) -> bool:
    """Say whether the adapter also stores the embedding as its output head."""
    return any(
        is_head(replaced_name(tensor.name)) and same_tensor(tensor, replacement.tensor)
        for tensor in matched.adapter.replacements
    )


def _shape_in_base(changes: Changes, replacement: Replacement, base: BaseModel) -> tuple[int, ...]:
    """Return a head's shape before the vocabulary was resized, as a replaced embedding tells."""
    shape = replacement.info.shape
    for name, each in changes.replaced.items():
        if is_embedding(name.rpartition(".")[0]) and each.info.shape == shape:
            return base.tensors[name].info.shape
    return shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
