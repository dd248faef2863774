"""What an adapter's heads, biases and embeddings are to a base: replaced, new, or not all there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import SAVED_BY_TASK, VeraConfig
from vera_convert.adapter.tensors import SavedModules, replaced_name
from vera_convert.base.model import BaseModel
from vera_convert.base.naming import Match
from vera_convert.files.reading import printable
from vera_convert.rules import (
    MODULE_TO_SAVE_MISSING,
    REPLACEMENT_NEW,
    REPLACEMENT_UNKNOWN,
    Finding,
)


def saved_modules(config: VeraConfig) -> SavedModules:
    """Return the modules that PEFT saves whole: those of the config, and those of its task."""
    implied = SAVED_BY_TASK.get(config.task_type or "", ())
    return SavedModules((*(config.modules_to_save or ()), *implied))


def brought(config: VeraConfig, name: str, target: str) -> Finding:
    """Say of a tensor that the base does not have whether it is a new head, or nobody's.

    Args:
        config: the adapter's.
        name: the tensor's in the adapter's file.
        target: its name in the base.
    """
    module = replaced_name(name).rpartition(".")[0]
    if saved_modules(config).of(module):
        return REPLACEMENT_NEW.at(printable(target), "the base has no such tensor.")
    return REPLACEMENT_UNKNOWN.at(printable(target), f"{printable(name)} would replace it.")


def incomplete_modules(
    adapter: Adapter, match: Match, base: BaseModel, targets: Mapping[str, str]
) -> Iterator[Finding]:
    """Yield each weight and bias of a module that is saved whole which the adapter lacks.

    The base has it, so the module has; what else lies beside it can be a quantiser's.

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
