"""The sizes that an adapter changes: the rows of the vocabulary, and the labels of a classifier."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from vera_convert import rules
from vera_convert.base.model import BaseModel
from vera_convert.base.vocabulary import shared_embedding, tied_copies, vocabulary_fields
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.rules import Finding
from vera_convert.text import printable


class Resizes(NamedTuple):
    """The vocabulary and the classifier that an adapter makes taller or shorter.

    Attributes:
        vocabulary: rows of the embedding in the base and in the adapter; None if equal.
        labels: rows of the classifier in the base and in the adapter; None if equal.
        findings: the tensors whose shapes contradict the base.
    """

    vocabulary: tuple[int, int] | None
    labels: tuple[int, int] | None
    findings: tuple[Finding, ...]


_BIAS_OF_LOGITS = "final_logits_bias"
"""The last part of the name of a buffer (1, vocabulary), which BART and similar models store."""

_RESIZED_IN_PART = frozenset(("fsmt", "t5gemma"))
"""Types of which transformers 5 loads no model whose vocabulary transformers has resized."""

NO_RESIZES = Resizes(None, None, ())


def resizes(
    shapes: Mapping[str, tuple[int, ...]], base: BaseModel, *, heads: Collection[str]
) -> Resizes:
    """Return the vocabulary and the classifier that an adapter resizes.

    A vocabulary can be resized if the adapter resizes every embedding and every output head, and
    if a field of the config gives the size. A classifier can have another number of labels.

    Args:
        shapes: shapes of the adapter's tensors by the name of the base's tensor.
        base: the base.
        heads: the names in `shapes` that belong to a classifier.
    """
    shapes = {**shapes, **{name: shapes[other] for name, other in followers(shapes, base)}}
    words: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, int]] = {}
    wrong: dict[str, str] = {}
    for name, shape in shapes.items():
        own = _own_shape(name, shape, base)
        if own == shape:
            continue
        if own[1:] != shape[1:] or not own:
            wrong[name] = ""
        elif _is_of_vocabulary(name, base):
            words[name] = (own[0], shape[0])
        elif name in heads:
            labels[name] = (own[0], shape[0])
        else:
            wrong[name] = ""
    wrong |= dict.fromkeys(labels, "") if len({*labels.values()}) > 1 else {}
    reason = _why_not_resized(words, shapes, base)
    wrong |= dict.fromkeys(words, reason) if reason is not None else {}
    findings = [shape_differs(name, shapes[name], base, more) for name, more in wrong.items()]
    return Resizes(
        next((each for name, each in words.items() if name not in wrong), None),
        next((each for name, each in labels.items() if name not in wrong), None),
        tuple(findings),
    )


def shape_differs(name: str, shape: tuple[int, ...], base: BaseModel, more: str = "") -> Finding:
    """Return the finding that a tensor has another shape in the base.

    Args:
        name: the base's name of the tensor.
        shape: the adapter's shape of it.
        base: the base.
        more: the reason why the shape is wrong, as the end of a sentence.
    """
    own = _own_shape(name, shape, base)
    reason = f"the adapter's is {shape_text(shape)}, the base's {shape_text(own)}{more}."
    return rules.REPLACEMENT_SHAPE.in_tensor(name, reason)


def _own_shape(name: str, shape: tuple[int, ...], base: BaseModel) -> tuple[int, ...]:
    """Return the base's shape of a tensor; for a head that the base lacks, the embedding's."""
    if name not in base.tensors and len(shape) == 2 and _is_of_vocabulary(name, base):
        name = shared_embedding(base, name, None, shape[1]) or name
    return base.tensors[name].info.shape if name in base.tensors else shape


def followers(shapes: Mapping[str, tuple[int, ...]], base: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield each tensor of the base that transformers resizes with another, and the other.

    Args:
        shapes: shapes of the adapter's tensors by the name of the base's tensor.
        base: the base.
    """
    for copy, source in tied_copies(base):
        pairs = [(copy, source)] + [(source, copy)] * copy.endswith(".bias")
        for name, other in pairs:
            is_missing = name in base.tensors and name not in shapes and other in shapes
            if is_missing and shapes[other] != base.tensors[name].info.shape:
                yield name, other


def _why_not_resized(
    words: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]], base: BaseModel
) -> str | None:
    """Return the reason why a vocabulary cannot be resized; None if the resize is right."""
    if not words:
        return None
    if base.model_type in _RESIZED_IN_PART:
        return f", and transformers resizes only a part of {base.model_type}"
    if len({*words.values()}) > 1:
        return ", and not all embeddings and output heads are resized alike"
    old, new = next(iter(words.values()))
    for name, tensor in base.tensors.items():
        is_old = _is_of_vocabulary(name, base) and tensor.info.shape[:1] == (old,)
        if is_old and shapes.get(name, ())[:1] != (new,):
            return f", and {printable(name)} has {old:,} rows that the adapter does not replace"
    if not vocabulary_fields(base, old):
        return f", and no vocab_size of the base's config is {old:,}"
    return None


def biases_of_logits(found: Resizes, base: BaseModel) -> Iterator[tuple[str, int]]:
    """Yield each bias of the logits that is resized with the vocabulary, and the new length.

    PEFT does not save this buffer. The ``resize_token_embeddings`` of transformers cuts the buffer,
    or appends zeros, so the merge does so too.
    """
    if found.vocabulary is not None:
        old, new = found.vocabulary
        for name, tensor in base.tensors.items():
            if name.rpartition(".")[2] == _BIAS_OF_LOGITS and tensor.info.shape == (1, old):
                yield name, new


def _is_of_vocabulary(name: str, base: BaseModel) -> bool:
    """Say whether a tensor has a row for each token: an embedding, or an output head's tensor.

    The files of BERT and of similar models name the bias of the head ``X.decoder`` ``X.bias``. If
    the base has ``X.weight``, the bias belongs to the layer X, such as SwiftFormer's classifier.
    """
    module, _, parameter = name.rpartition(".")
    is_of_decoder = parameter == "bias" and f"{module}.weight" not in base.tensors
    heads = [module, f"{module}.decoder"] if is_of_decoder else [module]
    return is_embedding(module) or any(is_output_head(head, base.model_type) for head in heads)


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape for people, such as ``3 by 768``."""
    return " by ".join(f"{size:,}" for size in shape) or "a single value"
