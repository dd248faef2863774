"""Set the fields of a merged model's ``config.json`` that an adapter decides.

head        the class that has the head, and the number of labels
padding     the token by which a text classifier finds the end of a text
vocabulary  the number of rows of the embedding
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vera_convert import rules
from vera_convert.adapter.saved_modules import replaced_name
from vera_convert.adapter.sorting import same_tensor
from vera_convert.base.model import BaseModel
from vera_convert.base.resizes import shape_differs
from vera_convert.base.task_classes import class_beginnings, class_of_head, needed_modules
from vera_convert.base.tied import SCALE, SCALED_BY_A_FIELD
from vera_convert.base.vocabulary import embedding_rows, tied_copies, vocabulary_fields
from vera_convert.embeddings import is_embedding, is_output_head
from vera_convert.errors import CheckpointError, ParameterError
from vera_convert.files.json_edit import edited_member
from vera_convert.merging.changes import Changes
from vera_convert.merging.inputs import MergeInputs
from vera_convert.rules import Finding
from vera_convert.text import counted, listed, printable

CONFIG_NAME = "config.json"
_OUTPUTS = frozenset(
    ("score", "classifier", "qa_outputs", "out_proj", "linear_out", "logits_proj", "logits", "head")
)
"""Last path elements of the layer in a head that outputs one value for each label. If no layer has
such a name, the name is the end of a longer one, such as ``distillation_classifier`` of DeiT."""
_CLASSIFIERS = ("Classification", "ClassificationWithTeacher", "SemanticSegmentation")
_QUESTIONS = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
_OF_TEXTS = "ForSequenceClassification"
_DEFAULT_LABELS = 2
"""The number of labels that transformers assumes if a config has no labels."""
_ONE_EMBEDDING = frozenset(
    """
    blenderbot blenderbot-small led marian mt5 mvp pegasus pegasus_x pop2piano t5 udop umt5
    """.split()  # noqa: SIM905 - words read best as a text
)
"""The model types of which transformers 4 builds one embedding for encoder and decoder."""

Member = tuple[str, ...]
"""The path of a member of a config: the names of the objects around the member, then the name."""


@dataclass(frozen=True, slots=True)
class ConfigEdits:
    """Members of a config that a merge sets, by one decision or by all.

    Attributes:
        members: the values by path.
        phrase: a decision in words, for the note on the class; empty without a decision.
        open: members that depend on a missing file beside the adapter.
        findings: notes and warnings.
    """

    members: Mapping[Member, object] = field(default_factory=dict)
    phrase: str = ""
    open: frozenset[Member] = frozenset()
    findings: tuple[Finding, ...] = ()

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


def config_edits(inputs: MergeInputs, changes: Changes) -> ConfigEdits:
    """Return the members of the base's config that the adapters of a merge change.

    Raises:
        CheckpointError: a classifier has another number of rows than in the base, and no field of
            the config can give the number.
        UsageError: the number of given labels differs from the classifier's.
    """
    base, options = inputs.base.model, inputs.options
    head = _Head.of(inputs, changes)
    if options.labels and len(options.labels) != head.labels:
        given = counted(len(options.labels), "name")
        raise ParameterError("labels", f"has {given}, and the adapter {head.in_words}.")
    new = [*_new_modules(base, changes)]
    is_head = bool(head.names) or any(is_output_head(module, base.model_type) for _, module in new)
    name = options.architecture or (head.trained_class if is_head else None)
    shown = name or next(iter(base.class_names), "")
    of_class: list[ConfigEdits] = []
    if base.config and (name is not None or options.labels):
        own = _class(base, name)
        of_class = [own, _labels(inputs, head, shown, own), _padding(inputs, changes, head, shown)]
    edits = [_vocabulary(base, changes), *of_class, _scale(base, changes)]
    findings = [finding for each in edits for finding in each.findings]
    # A base of the result's own class stores all tensors of the class.
    is_same = options.architecture is None and name in base.class_names
    if name is None or is_same:
        reason = "the base has no such tensor, and no class with this tensor is known."
        findings += [rules.REPLACEMENT_NEW.in_tensor(tensor, reason) for tensor, _ in new]
    findings += _strange_class(base, options.architecture)
    findings += _missing_modules(base, changes, name or head.trained_class or shown)
    findings += _stacks(base, changes)
    said = "; ".join(each.phrase for each in of_class if each.phrase)
    if said:
        findings.append(rules.HEAD_CLASS_WRITTEN.in_file(CONFIG_NAME, f"{said}."))
    found = ConfigEdits(
        {path: value for each in edits for path, value in each.members.items()},
        open=frozenset[Member]().union(*(each.open for each in edits)),
        findings=tuple(findings),
    )
    _require_count(found, base, changes)
    return found


def _require_count(edits: ConfigEdits, base: BaseModel, changes: Changes) -> None:
    """Refuse a resized classifier if the config does not give a loader the number of labels."""
    resized = changes.resizes.labels
    if resized is None or label_count(edits.of_value(base.config)) == resized[1]:
        return
    more = ", and no class is known whose labels config.json could count"
    raise CheckpointError.of(
        shape_differs(name, each.stored.shape, base, more)
        for name, each in changes.replaced.items()
        if each.is_of_classifier and each.stored.shape != base.tensors[name].info.shape
    )


# --- the class -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Head:
    """The classifier that adapters replace or add.

    Attributes:
        names: the names of the classifier's tensors; empty without a classifier.
        labels: the number of labels; None if the number is not known.
        trained_class: the class that the adapter was trained with; None if the class is not known.
    """

    names: tuple[str, ...]
    labels: int | None
    trained_class: str | None

    @classmethod
    def of(cls, inputs: MergeInputs, changes: Changes) -> _Head:
        """Find the classifier among the changes of a merge."""
        base = inputs.base.model
        heads = {name: each for name, each in changes.replacing.items() if each.is_of_classifier}
        owner = next((each.owner for each in heads.values()), inputs.adapters[0])
        trained_class = class_of_head(owner.adapter.config, base)
        shapes = {name: each.stored.shape for name, each in heads.items()}
        return cls((*heads,), _last_outputs(shapes, base), trained_class)

    @property
    def in_words(self) -> str:
        """The end of a sentence about the adapter."""
        if self.labels is None:
            return "has no classifier: give no labels"
        return f"has a classifier of {self.labels} labels: give {self.labels} names"


def _last_outputs(shapes: Mapping[str, tuple[int, ...]], base: BaseModel) -> int | None:
    """Return the number of outputs of a head's last layer; None if that layer is not known."""
    outputs = {
        name.rpartition(".")[0]: shape[0]
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= 2 and not _is_of_body(name, shape, base)
    }
    if len(outputs) > 1:
        last = {path: path.rpartition(".")[2] for path in outputs}
        named = [path for path in outputs if last[path] in _OUTPUTS]
        ends = tuple(f"_{name}" for name in _OUTPUTS)
        named = named or [path for path in outputs if last[path].endswith(ends)]
        outputs = {path: outputs[path] for path in named}
    counts = {*outputs.values()}  # a distilled model has two such layers
    return counts.pop() if len(counts) == 1 else None


def _is_of_body(name: str, shape: tuple[int, ...], base: BaseModel) -> bool:
    """Say whether the base has such a layer, which the config does not count as labels."""
    tensor = base.tensors.get(name)
    is_same = tensor is not None and tensor.info.shape == shape
    return is_same and shape[0] != label_count(base.config)


def _class(base: BaseModel, name: str | None) -> ConfigEdits:
    if name is None or base.class_names == (name,):
        return ConfigEdits()
    return ConfigEdits({("architectures",): [name]}, f"architectures is {printable(name)}")


def _strange_class(base: BaseModel, given: str | None) -> Iterator[Finding]:
    """Yield a warning if the class that a caller gives has a name unlike the base's classes."""
    beginnings = class_beginnings(base)
    if given is not None and beginnings and not given.startswith(tuple(beginnings)):
        kind, example = printable(base.model_type or ""), printable(beginnings[0])
        of_type = f" of type {kind}" if kind else ""
        reason = (
            f"the class is {printable(given)}, but classes of a model{of_type} begin with "
            f"{listed(beginnings)}, such as {example}ForSequenceClassification."
        )
        yield rules.CLASS_STRANGE.at("--architecture", reason)


def _new_modules(base: BaseModel, changes: Changes) -> Iterator[tuple[str, str]]:
    """Yield each new tensor that only another class than the base's loads, and the module."""
    copies = dict(tied_copies(base))  # an embedding can be stored for each stack
    for name, replacement in changes.new.items():
        module = replaced_name(replacement.tensor.name).rpartition(".")[0]
        paths = (name.rpartition(".")[0], module)
        is_head = any(is_output_head(path, base.model_type) for path in paths)
        if name not in copies and not (is_head and changes.unties):
            yield name, module


def _missing_modules(base: BaseModel, changes: Changes, name: str) -> Iterator[Finding]:
    """Yield a warning for each module of the class that neither base nor adapter stores."""
    stored = {tensor.rpartition(".")[0] for tensor in (*base.tensors, *changes.new)}
    for module in needed_modules(base.model_type, name):
        if not any(path == module or path.endswith(f".{module}") for path in stored):
            reason = (
                f"the class {printable(name)} has this module, and neither base nor adapter "
                "stores the module."
            )
            yield rules.HEAD_MODULE_MISSING.at(f"{module}.weight", reason)


def _stacks(base: BaseModel, changes: Changes) -> Iterator[Finding]:
    """Yield a warning if encoder or decoder has an embedding that transformers 4 does not load."""
    replacing = changes.replacing
    for copy, source in tied_copies(base) if base.model_type in _ONE_EMBEDDING else ():
        own, shared = replacing.get(copy), replacing.get(source)
        if own is None or not is_embedding(copy.rpartition(".")[0]):
            continue
        if shared is None or not same_tensor(own.tensor, shared.tensor):
            reason = f"{printable(source)} has other values."
            yield rules.STACKS_SHARE_IN_TRANSFORMERS_4.in_tensor(copy, reason)
            return


# --- labels and padding --------------------------------------------------------------------------


def _labels(inputs: MergeInputs, head: _Head, name: str, of_class: ConfigEdits) -> ConfigEdits:
    """Set the names of the labels, unless the base's config is right."""
    count, config = head.labels, inputs.base.model.config
    if count is None or not name.endswith((*_CLASSIFIERS, *_QUESTIONS)):
        return ConfigEdits()
    labels = inputs.options.labels or inputs.beside.labels
    old = config.get("id2label")
    is_new = bool(of_class.members) and old is None and name.endswith(_CLASSIFIERS)
    is_named = len(labels) == count
    if not is_named and label_count(config) == count and not is_new:
        return ConfigEdits()
    names = [*labels] if is_named else [f"LABEL_{n}" for n in range(count)]
    wanted = {str(n): label for n, label in enumerate(names)}
    if wanted == old:
        return ConfigEdits()
    members: dict[Member, object] = {
        ("id2label",): wanted,
        ("label2id",): {label: n for n, label in enumerate(names)},
    }
    if "num_labels" in config:
        members["num_labels",] = count
    how = "" if is_named else ", named LABEL_0 and so on (--labels names them)"
    are = "is 1 label" if count == 1 else f"are {count:,} labels"
    return ConfigEdits(members, f"there {are}{how}")


def _padding(inputs: MergeInputs, changes: Changes, head: _Head, name: str) -> ConfigEdits:
    """Set the padding token of a class that classifies by the last token of a text."""
    by_last = any(each.rpartition(".")[0].rpartition(".")[2] == "score" for each in head.names)
    if not name.endswith(_OF_TEXTS) or not by_last:
        return ConfigEdits()
    base = inputs.base.model
    part = base.config.get("text_config")
    path = ("text_config", "pad_token_id") if isinstance(part, dict) else ("pad_token_id",)
    own = (part if isinstance(part, dict) else base.config).get("pad_token_id")
    token = inputs.beside.pad_token_id
    if token is None:
        reason = "neither the base's config nor a file beside the adapter names the token."
        missing = rules.HEAD_WITHOUT_PADDING.in_file(CONFIG_NAME, reason)
        return ConfigEdits(open=frozenset([path]), findings=() if own is not None else (missing,))
    resized = changes.resizes.vocabulary
    rows = embedding_rows(base) if resized is None else resized[1]
    if token == own or (rows is not None and not 0 <= token < rows):
        return ConfigEdits()
    return ConfigEdits({path: token}, f"pad_token_id is {token}, as beside the adapter")


# --- the vocabulary ------------------------------------------------------------------------------


def _vocabulary(base: BaseModel, changes: Changes) -> ConfigEdits:
    """Set the size of a resized vocabulary."""
    if changes.resizes.vocabulary is None:
        return ConfigEdits()
    old, new = changes.resizes.vocabulary
    reason = f"vocab_size is {new:,} where the base has {old:,}."
    note = rules.HEAD_CLASS_WRITTEN.in_file(CONFIG_NAME, reason)
    return ConfigEdits(dict.fromkeys(vocabulary_fields(base, old), new), findings=(note,))


def _scale(base: BaseModel, changes: Changes) -> ConfigEdits:
    """Switch off the scaling of the decoder's output that the head's weight takes over."""
    is_moved = changes.moves_scale(base) and base.model_type in SCALED_BY_A_FIELD
    return ConfigEdits({(SCALE,): False} if is_moved else {})


def label_count(config: Mapping[str, object]) -> int:
    """Return the number of labels of a config, as transformers reads the config."""
    named, number = config.get("id2label"), config.get("num_labels")
    if isinstance(named, dict):
        return len(named)
    return number if isinstance(number, int) else _DEFAULT_LABELS
