"""Set the fields of a merged model's ``config.json`` that an adapter decides.

head        the class that has the head, and the number of labels
padding     the token by which a text classifier finds the end of a text
vocabulary  the number of rows of the embedding
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.base.model import BaseModel
from vera_convert.base.resizes import shape_differs
from vera_convert.base.task_classes import class_of_head, needed_modules
from vera_convert.base.vocabulary import embedding_rows, vocabulary_fields
from vera_convert.embeddings import is_output_head
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.json_edit import edited_member
from vera_convert.merging.adapter_files import AdapterFacts
from vera_convert.merging.changes import Changes, Replacement
from vera_convert.rules import (
    HEAD_CLASS_WRITTEN,
    HEAD_MODULE_MISSING,
    HEAD_WITHOUT_PADDING,
    REPLACEMENT_NEW,
    Finding,
)
from vera_convert.text import printable

CONFIG_NAME = "config.json"
_OUTPUTS = frozenset(
    ("score", "classifier", "qa_outputs", "out_proj", "linear_out", "logits_proj", "logits")
)
"""Last path elements of the layer in a head that outputs one value for each label."""
_CLASSIFIERS = ("Classification", "SemanticSegmentation")
_QUESTIONS = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
_OF_TEXTS = "ForSequenceClassification"
_DEFAULT_LABELS = 2
"""The number of labels that transformers assumes if a config has no labels."""


@dataclass(slots=True)
class ConfigEdits:
    """Members of a config that a merge sets, and the findings about the members.

    Attributes:
        members: the values by path.
        labels_given: whether the caller gave the names of the labels.
        open: members that depend on a missing file beside the adapter.
        findings: notes and warnings.
    """

    members: dict[tuple[str, ...], object] = field(default_factory=dict)
    labels_given: bool = False
    open: set[tuple[str, ...]] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    @property
    def sets_labels(self) -> bool:
        """Whether the names and the number of the labels are set."""
        return ("id2label",) in self.members

    def of_text(self, text: bytes) -> bytes:
        """Return the bytes of a config with the members set."""
        for path, value in self.members.items():
            text = edited_member(text, path, value)
        return text

    def of_value(self, config: Mapping[str, object]) -> dict[str, object]:
        """Return the value of a config with the members set."""
        edited: dict[str, Any] = {
            name: dict(part) if isinstance(part, Mapping) else part for name, part in config.items()
        }
        for (*through, name), value in self.members.items():
            part = edited
            for outer in through:
                part = part[outer]
            part[name] = value
        return edited


def config_edits(
    base: BaseModel,
    changes: Changes,
    facts: AdapterFacts,
    config: VeraConfig,
    *,
    architecture: str | None = None,
    labels: Sequence[str] = (),
) -> ConfigEdits:
    """Return the members of the base's config that the adapters of a merge change.

    Args:
        base: the base.
        changes: the changes to the base's tensors.
        facts: the facts from the files beside the first adapter.
        config: the config of the first adapter.
        architecture: the class of the result, if the caller names a class.
        labels: the names of a classifier's labels, if the caller gives names.

    Raises:
        CheckpointError: a classifier has another number of rows than in the base, and no field of
            the config can give the number.
        UsageError: the number of given labels differs from the classifier's.
    """
    edits = ConfigEdits(labels_given=bool(labels))
    rows = _vocabulary(edits, base, changes)
    heads = {name: each for name, each in _all(changes).items() if each.is_of_classifier}
    owner = next((each.owner.adapter.config for each in heads.values()), config)
    trained = class_of_head(owner, base)
    name = architecture or (trained if heads else None)
    count = _label_count(heads, base)
    if labels and (count is None or len(labels) != count):
        has = "brings no classifier" if count is None else f"has a classifier of {count} labels"
        raise UsageError(f"--labels names {len(labels)} labels, and the adapter {has}.")
    if name is None:
        edits.findings += _unknown_class(changes)
    shown = name or next(iter(_architectures(base)), "")
    if base.config and (name is not None or labels):
        said = [*_class(edits, base, name)] if name is not None else []
        said += _labels(edits, base, shown, count, labels or facts.labels)
        said += _padding(edits, base, shown, facts, rows=rows, heads=heads)
        if said:
            edits.findings.append(HEAD_CLASS_WRITTEN.in_file(CONFIG_NAME, f"{'; '.join(said)}."))
    edits.findings += _missing_modules(base, changes, name or trained or shown)
    _refuse_other_labels(edits, base, changes)
    return edits


def _refuse_other_labels(edits: ConfigEdits, base: BaseModel, changes: Changes) -> None:
    """Refuse a resized classifier if the config does not give a loader the number of labels."""
    resized = changes.resizes.labels
    if resized is None or label_count(edits.of_value(base.config)) == resized[1]:
        return
    more = ", and no class is known whose labels config.json could count"
    raise CheckpointError.of(
        shape_differs(name, each.info.shape, base, more)
        for name, each in changes.replaced.items()
        if each.is_of_classifier and each.info.shape != base.tensors[name].info.shape
    )


def _all(changes: Changes) -> dict[str, Replacement]:
    return {**changes.replaced, **changes.new}


# --- the class -----------------------------------------------------------------------------------


def _unknown_class(changes: Changes) -> Iterator[Finding]:
    """Yield a warning for each new tensor for which no class is known."""
    for name, replacement in changes.new.items():
        module = replaced_name(replacement.tensor.name).rpartition(".")[0]
        if not (is_output_head(module) and changes.unties):
            reason = "the base has no such tensor, and no class with this tensor is known."
            yield REPLACEMENT_NEW.in_tensor(name, reason)


def _class(edits: ConfigEdits, base: BaseModel, name: str) -> Iterator[str]:
    if _architectures(base) == [name]:
        return
    edits.members["architectures",] = [name]
    yield f"architectures is {printable(name)}"


def _architectures(base: BaseModel) -> list[str]:
    found = base.config.get("architectures")
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _missing_modules(base: BaseModel, changes: Changes, name: str) -> Iterator[Finding]:
    """Yield a warning for each module of the class that neither base nor adapter stores."""
    stored = {tensor.rpartition(".")[0] for tensor in (*base.tensors, *changes.new)}
    for module in needed_modules(base.model_type, name):
        if not any(path == module or path.endswith(f".{module}") for path in stored):
            reason = f"the class {printable(name)} has it, but neither base nor adapter stores it."
            yield HEAD_MODULE_MISSING.at(f"{module}.weight", reason)


# --- labels --------------------------------------------------------------------------------------


def label_count(config: Mapping[str, object]) -> int:
    """Return the number of labels of a config, as transformers reads the config."""
    named, number = config.get("id2label"), config.get("num_labels")
    if isinstance(named, dict):
        return len(named)
    return number if isinstance(number, int) else _DEFAULT_LABELS


def _label_count(heads: Mapping[str, Replacement], base: BaseModel) -> int | None:
    """Return the number of outputs of a head's last layer; None if that layer is not known."""
    outputs = {
        name.rpartition(".")[0]: each.info.shape[0]
        for name, each in heads.items()
        if name.endswith(".weight")
        and len(each.info.shape) >= 2
        and not _is_of_body(name, each.info.shape, base)
    }
    if len(outputs) > 1:
        named = (path for path in outputs if path.rpartition(".")[2] in _OUTPUTS)
        outputs = {path: outputs[path] for path in named}
    return outputs.popitem()[1] if len(outputs) == 1 else None


def _is_of_body(name: str, shape: tuple[int, ...], base: BaseModel) -> bool:
    """Say whether the base has a layer of this shape that its config does not count as labels."""
    tensor = base.tensors.get(name)
    is_same = tensor is not None and tensor.info.shape == shape
    return is_same and shape[0] != label_count(base.config)


def _labels(
    edits: ConfigEdits,
    base: BaseModel,
    name: str,
    count: int | None,
    labels: Sequence[str],
) -> Iterator[str]:
    """Set the names of the labels, unless the base's config is right."""
    if count is None or not name.endswith((*_CLASSIFIERS, *_QUESTIONS)):
        return
    named = base.config.get("id2label")
    is_new = ("architectures",) in edits.members and named is None and name.endswith(_CLASSIFIERS)
    is_named = len(labels) == count
    if not is_named and label_count(base.config) == count and not is_new:
        return
    names = [*labels] if is_named else [f"LABEL_{n}" for n in range(count)]
    wanted = {str(n): label for n, label in enumerate(names)}
    if wanted == named:
        return
    edits.members["id2label",] = wanted
    edits.members["label2id",] = {label: n for n, label in enumerate(names)}
    if "num_labels" in base.config:
        edits.members["num_labels",] = count
    how = "" if is_named else ", named LABEL_0 and so on (--labels names them)"
    yield f"there {'is 1 label' if count == 1 else f'are {count:,} labels'}{how}"


# --- padding -------------------------------------------------------------------------------------


def _padding(
    edits: ConfigEdits,
    base: BaseModel,
    name: str,
    facts: AdapterFacts,
    *,
    rows: int | None,
    heads: Mapping[str, Replacement],
) -> Iterator[str]:
    """Set the padding token of a class that classifies by the last token of a text."""
    is_last = any(each.rpartition(".")[0].rpartition(".")[2] == "score" for each in heads)
    if not name.endswith(_OF_TEXTS) or not is_last:
        return
    part = base.config.get("text_config")
    inside = ("text_config",) if isinstance(part, dict) else ()
    own = part.get("pad_token_id") if isinstance(part, dict) else base.config.get("pad_token_id")
    token = facts.pad_token_id
    if token is not None and token != own and (rows is None or 0 <= token < rows):
        edits.members[*inside, "pad_token_id"] = token
        yield f"pad_token_id is {token}, as beside the adapter"
    if token is None:
        edits.open.add((*inside, "pad_token_id"))
    if token is None and own is None:
        reason = "neither the base's config nor a file beside the adapter names one."
        edits.findings.append(HEAD_WITHOUT_PADDING.in_file(CONFIG_NAME, reason))


# --- vocabulary ----------------------------------------------------------------------------------


def _vocabulary(edits: ConfigEdits, base: BaseModel, changes: Changes) -> int | None:
    """Set the size of a resized vocabulary, and return the rows of the embedding."""
    if changes.resizes.vocabulary is None:
        return embedding_rows(base)
    old, new = changes.resizes.vocabulary
    for path in vocabulary_fields(base, old):
        edits.members[path] = new
    reason = f"vocab_size is {new:,} where the base has {old:,}."
    edits.findings.append(HEAD_CLASS_WRITTEN.in_file(CONFIG_NAME, reason))
    return new
