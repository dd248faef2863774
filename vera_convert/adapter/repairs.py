"""Repair known old and damaged forms of an adapter without any loss.

Each step returns the repaired part and a phrase that names the change, empty if nothing changed. A
second repair changes nothing more. Unknown forms are left to the reader, which refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from vera_convert import rules
from vera_convert.adapter.config import ConfigFile, VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME, PREFIX, Names
from vera_convert.adapter.opening import Repaired
from vera_convert.adapter.sorting import same_tensor
from vera_convert.errors import CheckpointError
from vera_convert.files.tensorfile import TensorData
from vera_convert.text import listed, printable

_OF_INNER_MODEL = re.compile(r"model\.model\.(?:layers|encoder|decoder)\.")
"""Names of layers in PEFT's VeraModel. No model has layers of this name."""
OLDEST_WITH_UNKNOWN_FIELDS = (0, 14)
"""Older releases of PEFT raise TypeError on an unknown field, such as `peft_version`."""


def repaired(
    tensors: Sequence[TensorData],
    config_file: ConfigFile,
    *,
    peft_version: tuple[int, ...] | None = None,
) -> Repaired:
    """Return an adapter's tensors and config after all repairs, with a phrase for each change.

    Args:
        tensors: the tensors as stored.
        config_file: the config as stored.
        peft_version: the oldest PEFT to read the config, such as (0, 13); None for any.

    Raises:
        CheckpointError: two tensors would get the same name, or copies of A or B differ.
    """
    tensors, changes = with_proper_names(tensors, config_file.config)
    for step in (_as_vectors, _projections_once):
        tensors, change = step(tensors)
        changes.append(change)
    for edit in (_without_wrappers_in_config, partial(_for_reader, peft_version)):
        config_file, change = edit(config_file)
        changes.append(change)
    return Repaired(tensors, config_file, tuple(filter(None, changes)))


def with_proper_names(
    tensors: Sequence[TensorData], config: VeraConfig
) -> tuple[Sequence[TensorData], list[str]]:
    """Return the tensors under PEFT's names, if the names are clear, and a phrase for each step."""
    changes = []
    for step in (_without_foreign_parts, _without_adapter_name, _with_prefix):
        names = Names.of((tensor.name for tensor in tensors), config)
        tensors, change = step(tensors, names)
        changes.append(change)
    return tensors, changes


def _renamed(
    tensors: Sequence[TensorData], new_name: Callable[[str], str], change: str
) -> tuple[Sequence[TensorData], str]:
    renamed: dict[str, TensorData] = {}
    for tensor in tensors:
        name = new_name(tensor.name)
        if name in renamed:
            reason = f"another tensor would become {printable(name)} as well."
            raise CheckpointError(rules.NAME_TAKEN_TWICE.in_tensor(tensor.name, reason))
        renamed[name] = tensor
    count = sum(name != tensor.name for name, tensor in renamed.items())
    if not count:
        return tensors, ""
    found = [tensor._replace(name=name) for name, tensor in renamed.items()]
    return found, f"{change} ({count} tensors)"


def _without_foreign_parts(
    tensors: Sequence[TensorData], names: Names
) -> tuple[Sequence[TensorData], str]:
    """Remove wrappers' names, and a common text of all layers before PEFT's prefix."""
    split = {tensor.name: names.parts(tensor.name) for tensor in tensors}
    removed = {wrapper for parts in split.values() for wrapper in parts.wrappers}
    if names.begin_alike:
        removed |= {parts.front for parts in split.values() if parts.front}

    def new_name(name: str) -> str:
        parts = split[name]
        return parts.name if names.begin_alike else ".".join(filter(None, parts[1::-1]))

    return _renamed(tensors, new_name, f"removed {listed(sorted(removed))} from names")


def _without_adapter_name(
    tensors: Sequence[TensorData], names: Names
) -> tuple[Sequence[TensorData], str]:
    split = {tensor.name: names.without_adapter(tensor.name) for tensor in tensors}
    found = frozenset[str]().union(*(adapters for _, adapters in split.values()))
    if len(found) != 1:  # several adapters in one file: nothing tells which adapter counts
        return tensors, ""
    said = f"removed the adapter's name {printable(*found)} from names"
    return _renamed(tensors, lambda name: split[name][0], said)


def _with_prefix(tensors: Sequence[TensorData], names: Names) -> tuple[Sequence[TensorData], str]:
    """Add the prefix: to A and B always, to all other names if no layer has the prefix.

    Names of PEFT's inner model already have the second half of the prefix.
    """
    layers = names.beginnings.get("", ())
    is_inner = bool(layers) and all(map(_OF_INNER_MODEL.match, layers))
    missing = PREFIX.removesuffix("model.") if is_inner else PREFIX

    def new_name(name: str) -> str:
        if name.removeprefix("base_model.") in ("vera_A", "vera_B"):
            return f"base_model.{name.removeprefix('base_model.')}"
        return missing + name if names.beginnings.keys() == {""} else name

    return _renamed(tensors, new_name, "added the prefix base_model. to names")


def _without_wrappers_in_config(config_file: ConfigFile) -> tuple[ConfigFile, str]:
    """Remove wrappers' names from the lists of modules in the config."""
    config = config_file.config
    names = Names.of((), config)
    changes: dict[str, object] = {}
    for field_name in ("target_modules", "modules_to_save"):
        listed = getattr(config, field_name)
        if isinstance(listed, tuple) and any(names.parts(each).wrappers for each in listed):
            proper = (names.parts(each).name for each in listed)
            changes[field_name] = list(dict.fromkeys(filter(None, proper)))
    if not changes:
        return config_file, ""
    said = f"removed wrappers' names from {' and '.join(changes)}"
    return config_file.edited(changes), said


def _as_vectors(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    def is_column(tensor: TensorData) -> bool:
        return (
            tensor.name.endswith((".vera_lambda_b", ".vera_lambda_d"))
            and len(tensor.shape) == 2
            and tensor.shape[1] == 1
        )

    count = sum(map(is_column, tensors))
    if not count:
        return tensors, ""
    flat = [t._replace(shape=t.shape[:1]) if is_column(t) else t for t in tensors]
    return flat, f"dropped the second dimension of 1 from {count} lambdas"


def _projections_once(tensors: Sequence[TensorData]) -> tuple[Sequence[TensorData], str]:
    """Keep a single A and B of many equal copies; unequal copies are refused."""
    kept = list(tensors)
    removed = 0
    for last, shared_name in (("vera_A", A_NAME), ("vera_B", B_NAME)):
        copies = [t for t in kept if t.name.endswith(f".{last}") and t.name != shared_name]
        if not copies:
            continue
        shared = next((t for t in kept if t.name == shared_name), None)
        first = shared or copies[0]._replace(name=shared_name)
        for copy in copies:
            if not same_tensor(first, copy):
                reason = f"it differs from {printable(first.name)}."
                raise CheckpointError(rules.PROJECTIONS_DIFFER.in_tensor(copy.name, reason))
        dropped = {copy.name for copy in copies}
        kept = [tensor for tensor in kept if tensor.name not in dropped]
        kept += [] if shared else [first]
        removed += len(copies)
    return (kept, f"stored A and B once instead of {removed} times") if removed else (tensors, "")


def _for_reader(
    peft_version: tuple[int, ...] | None, config_file: ConfigFile
) -> tuple[ConfigFile, str]:
    if peft_version is None or peft_version >= OLDEST_WITH_UNKNOWN_FIELDS:
        return config_file, ""
    removed = [*config_file.unknown_fields]
    removed += ["peft_version"] if config_file.config.peft_version is not None else []
    if not removed:
        return config_file, ""
    names = listed(sorted(removed), 10)
    edited = config_file.edited({}, remove=frozenset(removed))
    return edited, f"removed config fields that old PEFT refuses: {names}"
