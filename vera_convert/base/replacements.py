"""What an adapter's heads, biases and embeddings are to a base: replaced, new, or not all there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import SAVED_BY_TASK, VeraConfig
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.base.match import Match
from vera_convert.base.model import BaseModel
from vera_convert.base.task_classes import class_of_task, has_head_of
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.rules import (
    BIAS_NOT_STORED,
    MODULE_TO_SAVE_MISSING,
    REPLACEMENT_NEW,
    REPLACEMENT_SHAPE,
    REPLACEMENT_UNKNOWN,
    Finding,
    Severity,
)
from vera_convert.text import listed, printable


def saved_modules(config: VeraConfig) -> SavedModules:
    """Return the modules that PEFT saves whole: those of the config, and those of its task."""
    implied = SAVED_BY_TASK.get(config.task_type or "", ())
    return SavedModules((*(config.modules_to_save or ()), *implied))


def class_of_head(config: VeraConfig, base: BaseModel) -> str | None:
    """Return the class of transformers that has the head of an adapter; None if nothing names it.

    Args:
        config: the adapter's.
        base: the base.
    """
    named = base.config.get("architectures")
    own = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    found = next((name for name in own if has_head_of(name, config.task_type)), None)
    if found is None and config.task_type is None:
        found = _described(config)
    return found or class_of_task(base.model_type, config.task_type)


def _described(config: VeraConfig) -> str | None:
    """Return the class that PEFT recorded of the model, if transformers has that class."""
    described = config.auto_mapping or {}
    name, library = (described.get(key) for key in ("base_model_class", "parent_library"))
    is_known = isinstance(library, str) and re.match(r"transformers(\.|\Z)", library)
    return name if is_known and isinstance(name, str) and name.isidentifier() else None


@dataclass(frozen=True, slots=True)
class Resizes:
    """What an adapter makes taller or shorter than in the base.

    Attributes:
        vocabulary: rows of the base's tables of words and of the adapter's; None if they agree.
        labels: rows of the base's classifier and of the adapter's; None if they agree.
        findings: tensors whose shape no model of the base's kind can have.
    """

    vocabulary: tuple[int, int] | None
    labels: tuple[int, int] | None
    findings: tuple[Finding, ...]


NO_RESIZES = Resizes(None, None, ())


def resizes(
    shapes: Mapping[str, tuple[int, ...]], base: BaseModel, *, heads: Collection[str]
) -> Resizes:
    """Return what tensors of an adapter resize, and refuse what does not fit together.

    A vocabulary can grow or shrink if every table of words and every output head does, and if a
    field of the config says so. A classifier can have another number of labels.

    Args:
        shapes: of the adapter's tensors, by the name of the tensor that each replaces.
        base: the base.
        heads: those of the names that are part of a classifier.
    """
    words: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, int]] = {}
    wrong: dict[str, str] = {}
    for name, shape in shapes.items():
        own = base.tensors[name].info.shape if name in base.tensors else shape
        if own == shape:
            continue
        module = name.rpartition(".")[0]
        if own[1:] != shape[1:] or not own:
            wrong[name] = ""
        elif is_output_head(module) or is_embedding(module):
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
        more: why that cannot be, as the end of a sentence.
    """
    own = base.tensors[name].info.shape
    reason = f"the adapter's is {_by(shape)}, the base's {_by(own)}{more}."
    return REPLACEMENT_SHAPE.in_tensor(name, reason)


def _why_not_resized(
    words: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]], base: BaseModel
) -> str | None:
    """Say why a vocabulary cannot be resized, as the end of a sentence; None if it can be."""
    if not words:
        return None
    if len({*words.values()}) > 1:
        return ", and its tables of words are not all of one height"
    old, new = next(iter(words.values()))
    for name, tensor in base.tensors.items():
        module = name.rpartition(".")[0]
        is_table = is_embedding(module) or is_output_head(module)
        if is_table and tensor.info.shape[:1] == (old,) and shapes.get(name, ())[:1] != (new,):
            return f", and {printable(name)} has {old:,} rows that the adapter does not replace"
    if not vocabulary_fields(base, old):
        return f", and no vocab_size of the base's config is {old:,}"
    return None


def _by(shape: tuple[int, ...]) -> str:
    return " by ".join(f"{size:,}" for size in shape) or "a single value"


def is_of_classifier(config: VeraConfig, name: str) -> bool:
    """Say whether a tensor belongs to a head that is no output head, and is saved whole.

    Args:
        config: the adapter's.
        name: the tensor's in the adapter's file.
    """
    module = replaced_name(name).rpartition(".")[0]
    is_saved = bool(saved_modules(config).of(module))
    return is_saved and not is_output_head(module) and not is_embedding(module)


def vocabulary_fields(base: BaseModel, rows: int) -> list[tuple[str, ...]]:
    """Return the paths of the config's fields that give the vocabulary this size."""
    found: list[tuple[str, ...]] = []
    if base.config.get("vocab_size") == rows:
        found.append(("vocab_size",))
    for name, part in base.config.items():
        if isinstance(part, Mapping) and part.get("vocab_size") == rows:
            found.append((name, "vocab_size"))
    return found


def brought(config: VeraConfig, name: str, target: str, base: BaseModel) -> Finding | None:
    """Say of a tensor that the base does not have whether something is wrong with it.

    A head that is new is right if its class is known: a merge names that class in the config.

    Args:
        config: the adapter's.
        name: the tensor's in the adapter's file.
        target: its name in the base.
        base: the base.
    """
    module = replaced_name(name).rpartition(".")[0]
    if not saved_modules(config).of(module):
        return REPLACEMENT_UNKNOWN.in_tensor(target, f"{printable(name)} would replace it.")
    if class_of_head(config, base) is not None:
        return None
    reason = "the base has no such tensor, and nothing names the class that has it."
    return REPLACEMENT_NEW.in_tensor(target, reason)


def incomplete_modules(
    adapter: Adapter, match: Match, base: BaseModel, targets: Mapping[str, str]
) -> Iterator[Finding]:
    """Yield each weight and bias of a module that is saved whole which the adapter lacks.

    The base has it, so the module has; what else lies beside it can be a quantizer's.

    Args:
        adapter: the adapter.
        match: how its names are brought to those of the base.
        base: the base.
        targets: the tensor of the base that each of its tensors replaces.
    """
    saved = saved_modules(adapter.config)
    stored = {*targets.values(), *match.tensors.values()}
    for name in base.tensors:
        path, _, parameter = name.rpartition(".")
        paths = {path, match.undo(path) or path}
        is_due = parameter in ("weight", "bias") and any(map(saved.of, paths))
        if is_due and name not in stored:
            reason = "the base has it and the module is saved whole; the adapter does not store it."
            yield MODULE_TO_SAVE_MISSING.at(printable(name), reason)


def lost_biases(adapter: Adapter, match: Match, base: BaseModel) -> Iterator[Finding]:
    """Warn if the config trains biases that the base has and the adapter's file does not.

    A file by PEFT 0.20 or earlier is warned of when it is read, because these never saved biases.
    """
    read = [finding for finding in adapter.findings if finding.code == BIAS_NOT_STORED.code]
    if not read or read[0].severity is not Severity.NOTE:
        return
    own = {f"{name.removesuffix('.weight')}.bias" for name in match.tensors.values()}
    meant = own if adapter.config.bias != "all" else None
    found = [
        name
        for name, tensor in base.tensors.items()
        if name.endswith(".bias")
        and len(tensor.info.shape) == 1
        and (meant is None or name in meant)
    ]
    if found:
        reason = f"the base has {listed(found, 1)}, and the file holds no bias."
        yield BIAS_NOT_STORED.in_file(WEIGHTS_NAME, reason)
