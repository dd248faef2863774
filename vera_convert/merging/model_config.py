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
from vera_convert.base.resizes import shape_differs
from vera_convert.base.task_classes import class_of_head, needed_modules
from vera_convert.base.vocabulary import embedding_rows, vocabulary_fields
from vera_convert.embeddings import is_output_head
from vera_convert.errors import CheckpointError, UsageError
from vera_convert.files.json_edit import edited_member
from vera_convert.merging.changes import Changes
from vera_convert.merging.inputs import MergeInputs
from vera_convert.rules import Finding
from vera_convert.text import counted, printable

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


_SCALED_IF_TIED = ("t5", "umt5", "longt5", "pop2piano")


def config_edits(inputs: MergeInputs, changes: Changes) -> ConfigEdits:
    """Return the members of the base's config that the adapters of a merge change.

    Raises:
        CheckpointError: a classifier has another number of rows than in the base, and no field of
            the config can give the number.
        UsageError: the number of given labels differs from the classifier's.
    """
    editor = _Editor(inputs, changes)
    editor.edit()
    return editor.edits


class _Editor:
    """Sets the members of a config in turn.

    Attributes:
        base: the base.
        changes: the changes to the base's tensors.
        heads: the tensors of a classifier that adapters replace or add.
        count: the number of the classifier's labels; None if the number is not known.
        edits: the new members.
    """

    def __init__(self, inputs: MergeInputs, changes: Changes) -> None:
        self.base = inputs.base.model
        self.changes = changes
        self.heads = {
            name: each for name, each in changes.replacing.items() if each.is_of_classifier
        }
        self.count = self._label_count()
        self.edits = ConfigEdits(labels_given=bool(inputs.options.labels))
        self._inputs = inputs

    def edit(self) -> None:
        """Set all members, and add the findings."""
        base, edits, options = self.base, self.edits, self._inputs.options
        rows = self._vocabulary()
        first = self._inputs.adapters[0].adapter.config
        owner = next((each.owner.adapter.config for each in self.heads.values()), first)
        trained = class_of_head(owner, base)
        name = options.architecture or (trained if self.heads else None)
        if options.labels and len(options.labels) != self.count:
            raise UsageError(
                f"--labels has {counted(len(options.labels), 'name')}, and the adapter "
                f"{self._what_it_has}."
            )
        if name is None:
            edits.findings += self._unknown_class()
        shown = name or next(iter(self.base.class_names), "")
        if base.config and (name is not None or options.labels):
            said = [*self._class(name)] if name is not None else []
            said += self._labels(shown)
            said += self._padding(shown, rows)
            if said:
                edits.findings.append(
                    rules.HEAD_CLASS_WRITTEN.in_file(CONFIG_NAME, f"{'; '.join(said)}.")
                )
        edits.findings += self._missing_modules(name or trained or shown)
        edits.findings += self._scaled_outputs()
        self._refuse_other_labels()

    def _scaled_outputs(self) -> Iterator[Finding]:
        """Keep the scaling of the decoder's output, which the T5 family reads from the tie."""
        config, field = self.base.config, "scale_decoder_outputs"
        is_scaled = self.base.model_type in _SCALED_IF_TIED and config.get(field) is not False
        if self.changes.unties and is_scaled:
            self.edits.members[field,] = True
            yield rules.OUTPUTS_SCALED.in_file(CONFIG_NAME, f"{field} is true.")

    @property
    def _what_it_has(self) -> str:
        if self.count is None:
            return "brings no classifier"
        return f"has a classifier of {self.count} labels"

    def _refuse_other_labels(self) -> None:
        """Refuse a resized classifier if the config does not give a loader the number of labels."""
        base, resized = self.base, self.changes.resizes.labels
        if resized is None or label_count(self.edits.of_value(base.config)) == resized[1]:
            return
        more = ", and no class is known whose labels config.json could count"
        raise CheckpointError.of(
            shape_differs(name, each.stored.shape, base, more)
            for name, each in self.changes.replaced.items()
            if each.is_of_classifier and each.stored.shape != base.tensors[name].info.shape
        )

    # --- the class -------------------------------------------------------------------------------

    def _unknown_class(self) -> Iterator[Finding]:
        """Yield a warning for each new tensor for which no class is known."""
        known = {*self.changes.replaced.values()}  # an embedding can be stored for each stack
        for name, replacement in self.changes.new.items():
            module = replaced_name(replacement.tensor.name).rpartition(".")[0]
            if replacement not in known and not (
                is_output_head(module, self.base.model_type) and self.changes.unties
            ):
                reason = "the base has no such tensor, and no class with this tensor is known."
                yield rules.REPLACEMENT_NEW.in_tensor(name, reason)

    def _class(self, name: str) -> Iterator[str]:
        if self.base.class_names != (name,):
            self.edits.members["architectures",] = [name]
            yield f"architectures is {printable(name)}"

    def _missing_modules(self, name: str) -> Iterator[Finding]:
        """Yield a warning for each module of the class that neither base nor adapter stores."""
        tensors = (*self.base.tensors, *self.changes.new)
        stored = {tensor.rpartition(".")[0] for tensor in tensors}
        for module in needed_modules(self.base.model_type, name):
            if not any(path == module or path.endswith(f".{module}") for path in stored):
                reason = (
                    f"the class {printable(name)} has this module, and neither base nor adapter "
                    "stores the module."
                )
                yield rules.HEAD_MODULE_MISSING.at(f"{module}.weight", reason)

    # --- labels ----------------------------------------------------------------------------------

    def _label_count(self) -> int | None:
        """Return the number of outputs of a head's last layer; None if that layer is not known."""
        outputs = {
            name.rpartition(".")[0]: each.stored.shape[0]
            for name, each in self.heads.items()
            if name.endswith(".weight")
            and len(each.stored.shape) >= 2
            and not self._is_of_body(name, each.stored.shape)
        }
        if len(outputs) > 1:
            named = (path for path in outputs if path.rpartition(".")[2] in _OUTPUTS)
            outputs = {path: outputs[path] for path in named}
        return outputs.popitem()[1] if len(outputs) == 1 else None

    def _is_of_body(self, name: str, shape: tuple[int, ...]) -> bool:
        """Say whether the base has such a layer, which the config does not count as labels."""
        tensor = self.base.tensors.get(name)
        is_same = tensor is not None and tensor.info.shape == shape
        return is_same and shape[0] != label_count(self.base.config)

    def _labels(self, name: str) -> Iterator[str]:
        """Set the names of the labels, unless the base's config is right."""
        count, config, members = self.count, self.base.config, self.edits.members
        if count is None or not name.endswith((*_CLASSIFIERS, *_QUESTIONS)):
            return
        labels = self._inputs.options.labels or self._inputs.beside.labels
        old = config.get("id2label")
        is_new = ("architectures",) in members and old is None and name.endswith(_CLASSIFIERS)
        is_named = len(labels) == count
        if not is_named and label_count(config) == count and not is_new:
            return
        names = [*labels] if is_named else [f"LABEL_{n}" for n in range(count)]
        wanted = {str(n): label for n, label in enumerate(names)}
        if wanted == old:
            return
        members["id2label",] = wanted
        members["label2id",] = {label: n for n, label in enumerate(names)}
        if "num_labels" in config:
            members["num_labels",] = count
        how = "" if is_named else ", named LABEL_0 and so on (--labels names them)"
        yield f"there {'is 1 label' if count == 1 else f'are {count:,} labels'}{how}"

    # --- padding and vocabulary ------------------------------------------------------------------

    def _padding(self, name: str, rows: int | None) -> Iterator[str]:
        """Set the padding token of a class that classifies by the last token of a text."""
        is_last = any(each.rpartition(".")[0].rpartition(".")[2] == "score" for each in self.heads)
        if not name.endswith(_OF_TEXTS) or not is_last:
            return
        part = self.base.config.get("text_config")
        path = ("text_config", "pad_token_id") if isinstance(part, dict) else ("pad_token_id",)
        own = (part if isinstance(part, dict) else self.base.config).get("pad_token_id")
        token = self._inputs.beside.pad_token_id
        if token is not None and token != own and (rows is None or 0 <= token < rows):
            self.edits.members[path] = token
            yield f"pad_token_id is {token}, as beside the adapter"
        if token is None:
            self.edits.open.add(path)
        if token is None and own is None:
            reason = "neither the base's config nor a file beside the adapter names the token."
            self.edits.findings.append(rules.HEAD_WITHOUT_PADDING.in_file(CONFIG_NAME, reason))

    def _vocabulary(self) -> int | None:
        """Set the size of a resized vocabulary, and return the rows of the embedding."""
        if self.changes.resizes.vocabulary is None:
            return embedding_rows(self.base)
        old, new = self.changes.resizes.vocabulary
        for path in vocabulary_fields(self.base, old):
            self.edits.members[path] = new
        reason = f"vocab_size is {new:,} where the base has {old:,}."
        self.edits.findings.append(rules.HEAD_CLASS_WRITTEN.in_file(CONFIG_NAME, reason))
        return new


def label_count(config: Mapping[str, object]) -> int:
    """Return the number of labels of a config, as transformers reads the config."""
    named, number = config.get("id2label"), config.get("num_labels")
    if isinstance(named, dict):
        return len(named)
    return number if isinstance(number, int) else _DEFAULT_LABELS
