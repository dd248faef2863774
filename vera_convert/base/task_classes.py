"""Name the class of transformers with the head of a task, for each type of model.

The table lies in ``task_classes.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vera_convert.adapter.config import VeraConfig
from vera_convert.base.model import BaseModel

CLASSES_FILE = Path(__file__).with_name("task_classes.txt")

_LETTERS = {"SEQ_CLS": "S", "TOKEN_CLS": "T", "QUESTION_ANS": "Qq"}
_ENDINGS = {
    "S": "ForSequenceClassification",
    "T": "ForTokenClassification",
    "Q": "ForQuestionAnswering",
    "q": "ForQuestionAnsweringSimple",
    "M": "ForMultipleChoice",
    "N": "ForNextSentencePrediction",
    "A": "ForAudioClassification",
}

_ENDING = re.compile("For[A-Z]|LMHead|WithLMHead|DoubleHeads|Encoder|Text|Model|PreTrained")
"""The end of a class name, after the name of the model."""


class _Classes(NamedTuple):
    """The classes of a model type.

    Attributes:
        stem: the beginning of the class names.
        needed: for each task's letter the needed modules, perhaps absent from base and adapter.
    """

    stem: str
    needed: Mapping[str, tuple[str, ...]]


@cache
def _classes() -> Mapping[str, _Classes]:
    """Read the table of classes by model type."""
    found = {}
    for line in CLASSES_FILE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            kind, stem, *tasks = line.split()
            parts = (task.partition(":") for task in tasks)
            found[kind] = _Classes(
                stem,
                {letter: tuple(filter(None, modules.split(","))) for letter, _, modules in parts},
            )
    return found


def class_of_task(model_type: str | None, task: str | None) -> str | None:
    """Return the class of transformers for a task of PEFT; None if unknown.

    Args:
        model_type: the field of the model's config.
        task: PEFT's name of the task, for example ``SEQ_CLS``.
    """
    known = _classes().get(model_type or "")
    letters = _LETTERS.get(task or "", "")
    found = next((letter for letter in known.needed if letter in letters), None) if known else None
    return f"{known.stem}{_ENDINGS[found]}" if known and found else None


def class_beginnings(base: BaseModel) -> list[str]:
    """Return the beginnings of the names of a base's classes; empty if unknown.

    A config with `auto_map` brings classes of its own, with any name.
    """
    known = _classes().get(base.model_type or "")
    if base.config.get("auto_map"):
        return []
    found = [known.stem] if known else []
    found += [_ENDING.split(name, maxsplit=1)[0] for name in base.class_names]
    return [*filter(None, dict.fromkeys(found))]


def has_head_of(name: str, task: str | None) -> bool:
    """Say whether the class `name` has the head of a task of PEFT, by the ending of the name."""
    return name.endswith(tuple(_ENDINGS[each] for each in _LETTERS.get(task or "", ())) or ("?",))


def needed_modules(model_type: str | None, name: str) -> tuple[str, ...]:
    """Return the modules needed by a class, perhaps absent from base and adapter.

    Args:
        model_type: the field of the model's config.
        name: the class.
    """
    known = _classes().get(model_type or "")
    needed = known.needed.items() if known else ()
    return next((modules for letter, modules in needed if name.endswith(_ENDINGS[letter])), ())


def class_of_head(config: VeraConfig, base: BaseModel) -> str | None:
    """Return the class of transformers with an adapter's head; None if unknown.

    Args:
        config: the adapter's.
        base: the base.
    """
    found = next((name for name in base.class_names if has_head_of(name, config.task_type)), None)
    if found is None and config.task_type is None:
        found = _described(config)
    return found or class_of_task(base.model_type, config.task_type)


def _described(config: VeraConfig) -> str | None:
    """Return the model's class as recorded by PEFT, if the class is part of transformers."""
    described = config.auto_mapping or {}
    name, library = (described.get(key) for key in ("base_model_class", "parent_library"))
    is_known = isinstance(library, str) and re.match(r"transformers(\.|\Z)", library)
    return name if is_known and isinstance(name, str) and name.isidentifier() else None


def class_without_body(config: VeraConfig, base: BaseModel) -> str | None:
    """Return the class of an adapter if the class loads none of the base's layers, else None.

    For a decoder like Llama, transformers' class for question answering names the body
    "transformer". The files of the base name the body "model", and no loader translates the name.

    Args:
        config: the adapter's config.
        base: the base.
    """
    name = class_of_head(config, base) or ""
    is_of_questions = name.endswith(_ENDINGS["Q"])
    bodies = {tensor.partition(".")[0] for tensor in base.tensors}
    return name if is_of_questions and "model" in bodies and "transformer" not in bodies else None
