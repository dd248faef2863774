"""``adapter_config.json`` as a record: read strictly, edited in place.

This module refuses every config that `VeraConfig` cannot express. The text of the file is kept, so
an edit changes the bytes of the named fields alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from vera_convert import rules
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.files.json_edit import edited_object
from vera_convert.files.reading import ByteSource
from vera_convert.files.strict_json import json_kind, parse_json, read_json
from vera_convert.rules import Finding, errors_of
from vera_convert.text import printable

LORA = "LORA"
"""How a config and a report name the method LoRA."""
MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1 << 24
"""Far above the rank of any adapter; a larger rank would only exhaust memory."""

MAX_FIELDS = 1_000
MAX_LISTED = 10_000
MAX_NAME = 10_000
"""Far above the needs of any model."""

KEY_RANGE = range(-(2**63), 2**64)
"""The seeds of ``torch.Generator.manual_seed``; a negative seed counts from 2^64 downwards."""

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

SAVED_BY_TASK: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The names appended by PEFT to modules_to_save, by task_type; a model has one of the names."""


@dataclass(frozen=True, slots=True)
class VeraConfig:
    """The fields of PEFT's ``VeraConfig`` with PEFT's defaults (a missing field means its default).

    Attributes:
        r: rank; rows of A, columns of B, length of every lambda_d.
        target_modules: names (matched as suffixes) or one regular expression; None means PEFT's
            default for the type of the base.
        projection_prng_key: seed of A and B.
        save_projection: whether A and B are stored with the adapter.
        vera_dropout: dropout on the layer's input, in training only.
        d_initial: initial value of every lambda_d.
        fan_in_fan_out: whether the base stores weights as (in, out); PEFT corrects this by layer.
        bias: which biases were trained: ``none``, ``all`` or ``vera_only``.
        modules_to_save: modules trained whole, in place of the base's modules.
        init_weights: whether lambda_b began at zero.
        layers_to_transform: the indices of the adapted layers; None means all.
        layers_pattern: the name before the index in a module's path.
        task_type: the task that PEFT wraps the model for.
        base_model_name_or_path: the name of the base; a stranger's text, never followed as a path.
        revision: the base's revision on the Hub.
        inference_mode: true in every saved file.
        auto_mapping: class and library of the base, if task_type is None.
        peft_version: the writing PEFT (0.18 and later record the version).
    """

    r: int = 256
    target_modules: tuple[str, ...] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    init_weights: bool = True
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, object] | None = None
    peft_version: str | None = None

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The names in modules_to_save and the names appended by PEFT for the task, each once."""
        implied = SAVED_BY_TASK.get(self.task_type or "", ())
        return tuple(dict.fromkeys((*(self.modules_to_save or ()), *implied)))

    @property
    def written_by_peft(self) -> bool:
        """Whether PEFT saved this config, by PEFT's version or a true ``inference_mode``."""
        return bool(self.peft_version) or self.inference_mode


FIELDS = frozenset(field.name for field in fields(VeraConfig))


class ConfigFile(NamedTuple):
    """A config with the text of the file.

    Attributes:
        config: the fields, with defaults in place of the wrong fields, so that the tensors can be
            checked too.
        text: the file's bytes.
        findings: the errors, one for each wrong field, and the warnings.
        wrong: the names of the wrong fields.
    """

    config: VeraConfig
    text: bytes
    findings: tuple[Finding, ...] = ()
    wrong: frozenset[str] = frozenset()

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """The fields of the file unknown to VeraConfig, in the file's order."""
        return tuple(name for name in json.loads(self.text) if _is_unknown(name))

    def edited(
        self, changes: Mapping[str, object], remove: frozenset[str] = frozenset()
    ) -> ConfigFile:
        """Return the file with some fields set and others removed; every other byte is kept."""
        return parse_config(edited_object(self.text, changes, remove), place=CONFIG_NAME)


class OtherMethodError(CheckpointError):
    """The config is that of an adapter of another method, such as LoRA.

    Attributes:
        method: the value of ``peft_type``; printable.
    """

    def __init__(self, finding: Finding, method: str) -> None:
        super().__init__(finding)
        self.method = method


def read_config(source: ByteSource) -> ConfigFile:
    """Read ``adapter_config.json``; wrong fields are findings of the result.

    Raises:
        CheckpointError: the file is no JSON object, or is the config of another method.
    """
    document, text = read_json(source, limit=MAX_CONFIG_BYTES, pythons_numbers=True)
    return _from_document(document, text, source.place)


def parse_config(text: bytes, *, place: str) -> ConfigFile:
    """Read a sound config from the bytes of its file.

    Raises:
        CheckpointError: with every defect.
    """
    file = _from_document(parse_json(text, place=place, pythons_numbers=True), text, place)
    if file.wrong:
        raise CheckpointError.of(errors_of(file.findings))
    return file


def _from_document(document: object, text: bytes, place: str) -> ConfigFile:
    if not isinstance(document, dict):
        reason = f"it holds {json_kind(document)} at its top level."
        raise CheckpointError(rules.CONFIG_NOT_OBJECT.in_file(place, reason))
    if len(document) > MAX_FIELDS:
        raise CheckpointError(rules.FIELD_RANGE.in_file(place, f"it has {len(document):,} fields."))
    if _is_foreign(document):
        finding = rules.NOT_VERA.in_file(place, _what_else(document))
        method = document.get("peft_type")
        if "peft_type" not in document and document.get("fine_tune_type") == "lora":
            method = LORA  # as MLX-LM writes its LoRAs
        if isinstance(method, str) and method.upper() != "VERA":
            raise OtherMethodError(finding, printable(method))
        raise CheckpointError(finding)
    unknown = (
        rules.UNKNOWN_FIELD.in_file(place, f"there is a field {printable(name)}.")
        for name in document
        if _is_unknown(name)
    )
    wrong = [*_field_findings(document, place)]
    wrong += _relation_findings(_of_fields(document, wrong), place)
    findings = (*(finding for _, finding in wrong), *unknown)
    names = frozenset(name for name, _ in wrong)
    return ConfigFile(_of_fields(document, wrong), text, findings, names)


def _of_fields(document: Mapping[str, object], wrong: Sequence[tuple[str, Finding]]) -> VeraConfig:
    """Return the config of the sound fields, with defaults in place of the wrong fields."""
    sound = FIELDS & document.keys() - {name for name, _ in wrong}
    return VeraConfig(**{name: _frozen(document[name]) for name in sound})  # type: ignore[arg-type]


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _is_unknown(name: str) -> bool:
    return name not in FIELDS and name != "peft_type"


_DIALECTS = {
    "LORA": "a LoRA adapter",
    "PVERA": "an adapter of PVeRA, another method of PEFT",
}
_FOREIGN_FIELDS = {
    "vera_alpha": "PaddleNLP, whose VeRA has a factor of its own",
    "lora_alpha": "mLoRA or MoE-PEFT, whose VeRA has a factor of its own",
    "c_initial": "VeRA-plus, which trains a third vector",
    "init_vera_weights": "VeRA-plus, whose methods are other ones",
}
"""Fields of trainers whose method is called VeRA too and is another method."""


def _is_foreign(document: Mapping[str, object]) -> bool:
    return document.get("peft_type") != "VERA" or not _FOREIGN_FIELDS.keys().isdisjoint(document)


def _what_else(document: dict[str, object]) -> str:
    """Describe in one sentence a config of another method or file."""
    kind = document.get("peft_type")
    if isinstance(kind, str) and kind.upper() == "VERA":
        for field, trainer in _FOREIGN_FIELDS.items():
            if field in document:
                return f"it has a field {field}: this is a config of {trainer}."
    if isinstance(kind, str) and kind in _DIALECTS:
        return f"peft_type is {kind}: this is {_DIALECTS[kind]}."
    if isinstance(kind, str):
        spelled = " (PEFT reads capitals only)" if kind.upper() == "VERA" else ""
        return f'peft_type is "{printable(kind)}", not "VERA"{spelled}.'
    if kind is not None:
        return f"peft_type is {json_kind(kind)} where the text VERA is expected."
    state = "null" if "peft_type" in document else "missing"
    if isinstance(document.get("config"), dict):  # it has a model_type as well
        return f"peft_type is {state}; it looks like a config of AdapterHub's adapters library."
    if "architectures" in document or "model_type" in document:
        return f"peft_type is {state}; it looks like the config.json of a whole model."
    return f"peft_type is {state}."


# --- the fields one by one -----------------------------------------------------------------------


_FORMS = {bool: "flag", int: "whole", float: "number", str: "text", dict: "object"}


def _form(value: object) -> str:
    """Return the form of a JSON value for `_TYPES`; of a list, the forms of its items."""
    if isinstance(value, list):
        return f"[{' '.join(sorted({*map(_form, value)}))}]"
    return _FORMS.get(type(value), "null")


_TYPES = (
    ("r", "a whole number", ("whole",)),
    (
        "target_modules",
        "a list of names, a regular expression or null",
        ("[text]", "[]", "text", "null"),
    ),
    ("layers_pattern", "a name, a list of names or null", ("[text]", "[]", "text", "null")),
    ("modules_to_save", "a list of names or null", ("[text]", "[]", "null")),
    (
        "layers_to_transform",
        "a whole number, a list of them or null",
        ("whole", "[whole]", "[]", "null"),
    ),
    ("save_projection fan_in_fan_out init_weights inference_mode", "true or false", ("flag",)),
    ("vera_dropout d_initial", "a number", ("number", "whole")),
    ("bias", "a text", ("text",)),
    (
        "task_type base_model_name_or_path revision peft_version",
        "a text or null",
        ("text", "null"),
    ),
    ("auto_mapping", "an object or null", ("object", "null")),
)
"""The fields, the expected values in words, and the forms of these values."""


def _field_findings(document: Mapping[str, object], place: str) -> Iterator[tuple[str, Finding]]:
    """Yield each field of a wrong type, with a finding."""
    for names, expected, forms in _TYPES:
        for name in names.split():
            if name in document and _form(document[name]) not in forms:
                reason = f"{name} is {json_kind(document[name])} where {expected} is expected."
                yield name, rules.FIELD_TYPE.in_file(place, reason)
    name = "projection_prng_key"
    key = document.get(name, 0)
    if not isinstance(key, int) or isinstance(key, bool):
        shown, kind = printable(json.dumps(key)), json_kind(key)
        said = shown if shown == kind else f"{shown}, {kind}"
        yield name, rules.KEY_INVALID.in_file(place, f"{name} is {said}.")
    elif key not in KEY_RANGE:
        yield name, rules.KEY_INVALID.in_file(place, f"{name} is {_shown(key)}.")


def _shown(number: float) -> str:
    """Return a number for a message; an integer can have thousands of digits."""
    return printable(str(number))


def _absurd_lists(config: VeraConfig, place: str) -> Iterator[tuple[str, Finding]]:
    """Refuse long lists: each name is compared with each other name."""
    for field in ("target_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        value = getattr(config, field)
        items = value if isinstance(value, tuple) else (value,)
        if len(items) > MAX_LISTED:
            yield field, rules.FIELD_RANGE.in_file(place, f"{field} has {len(items):,} entries.")
        if any(isinstance(item, str) and len(item) > MAX_NAME for item in items):
            reason = f"{field} has an entry of over {MAX_NAME:,} letters."
            yield field, rules.FIELD_RANGE.in_file(place, reason)


def _relation_findings(config: VeraConfig, place: str) -> Iterator[tuple[str, Finding]]:
    """Yield each well-typed field whose value PEFT cannot work with, with a finding."""
    yield from _absurd_lists(config, place)
    if not 1 <= config.r <= MAX_RANK:
        reason = f"r is {_shown(config.r)}; a rank is from 1 to {MAX_RANK}."
        yield "r", rules.FIELD_RANGE.in_file(place, reason)
    # PEFT loads NaN: such a dropout does nothing, and the stored lambda_d replaces d_initial.
    if config.vera_dropout < 0 or config.vera_dropout > 1:
        reason = f"vera_dropout is {_shown(config.vera_dropout)}; a probability is from 0 to 1."
        yield "vera_dropout", rules.FIELD_RANGE.in_file(place, reason)
    if isinstance(config.d_initial, int) and abs(config.d_initial) > sys.float_info.max:
        reason = f"d_initial is {_shown(config.d_initial)}, which no float holds."
        yield "d_initial", rules.FIELD_RANGE.in_file(place, reason)
    # PEFT from 0.18 on takes any "*_only" for the biases of adapted layers.
    if config.bias not in ("none", "all") and not config.bias.endswith("_only"):
        reason = f'bias is "{printable(config.bias)}"; PEFT knows none, all and vera_only.'
        yield "bias", rules.FIELD_VALUE.in_file(place, reason)
    if config.task_type is not None and config.task_type not in TASK_TYPES:
        known = ", ".join(TASK_TYPES)
        reason = f'task_type is "{printable(config.task_type)}"; PEFT knows {known} and null.'
        yield "task_type", rules.FIELD_VALUE.in_file(place, reason)
    if config.layers_pattern and config.layers_to_transform is None:
        reason = "layers_to_transform is null."
        yield "layers_pattern", rules.LAYERS_PATTERN_ALONE.in_file(place, reason)


def peft_release(version: str | None) -> tuple[int, int] | None:
    """Return (major, minor) of a recorded ``peft_version``; None if the text is no version."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", version or "")
    return (int(found[1]), int(found[2])) if found else None
