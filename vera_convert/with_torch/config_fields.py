"""Which fields of a stranger's config transformers gets: those that the class of the config has.

    field ── the class's own renames ──► declared, or read by the model's code? ──► kept

All others are left out: among them are fields that name code, attention kernels or weights
elsewhere, that hide a quantizer, or that rename fields themselves (`attribute_map`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NEVER = frozenset(
    """
    attribute_map auto_map attn_implementation experts_implementation fusion_config
    transformers_weights quantization_config use_pretrained_backbone name_or_path base_config_key
    sub_configs sub_configs_defaults model_type extra_files extra_config_files
    """.split()  # noqa: SIM905 - words read best as a text
)
"""Names that are never passed on, whatever class declares them; nor is one with a leading `_`.

`model_type` decides which class reads a config. It is no field of that class.
"""
_POPPED = re.compile(r"kwargs\.(?:pop|get)\(\s*[\"'](\w+)")
_READ = re.compile(r"\bconfig\.([a-zA-Z]\w*)|getattr\(\s*(?:self\.)?config,\s*[\"']([a-zA-Z]\w*)")
_DEEPEST = 8
"""Configs inside configs: real ones have three levels."""


def known_fields(
    kind: type[Any], document: Mapping[str, object], depth: int = 0
) -> dict[str, object]:
    """Return the fields of a config that its class has, and of configs inside alike.

    Args:
        kind: the class of transformers that reads the config.
        document: the config as it is stored.
        depth: how many configs this one lies in.
    """
    allowed = _allowed(kind)  # type: ignore[arg-type] # a class can be hashed
    renames: Mapping[str, str] = kind.attribute_map
    found: dict[str, object] = {}
    for name, value in document.items():
        field = renames.get(name, name)
        if not {name, field} <= allowed or _is_forbidden(name) or _is_forbidden(field):
            continue
        if isinstance(value, Mapping):
            found[name] = _inside(kind, name, value, depth + 1)
        else:
            found[name] = value
    return found


def _inside(kind: type[Any], name: str, value: Mapping[str, object], depth: int) -> object:
    """Return a field that holds a config of its own, or a plain record."""
    if depth > _DEEPEST:
        return {}
    if name == "per_layer_config":  # what single layers have in the place of the model's
        return {
            layer: known_fields(kind, fields, depth) if isinstance(fields, Mapping) else fields
            for layer, fields in value.items()
        }
    inner = _class_inside(kind, name, value)
    if inner is None:
        return _plain(value, depth)
    said = {"model_type": value["model_type"]} if "model_type" in value else {}
    return said | known_fields(inner, value, depth)


def _class_inside(kind: type[Any], name: str, value: Mapping[str, object]) -> type[Any] | None:
    """Return the class that reads a config inside another; None if the field is a plain record."""
    import transformers

    declared = dict(getattr(kind, "sub_configs", None) or {}).get(name)
    said = value.get("model_type")
    named = isinstance(said, str) and said in transformers.CONFIG_MAPPING
    if declared is None and not named:
        return None
    found: Any = transformers.CONFIG_MAPPING[said] if named else declared
    # Without a known type AutoConfig knows no fields but those that all configs have.
    return found if hasattr(found, "attribute_map") else _plain_config()


def _plain_config() -> type[Any]:
    import transformers

    found: type[Any] = transformers.PretrainedConfig
    return found


def _plain(value: object, depth: int) -> object:
    """Return a record, such as that of rotary positions, without names that lead elsewhere."""
    if depth > _DEEPEST:
        return None
    if isinstance(value, Mapping):
        return {
            name: _plain(each, depth + 1) for name, each in value.items() if not _is_forbidden(name)
        }
    return value


def _is_forbidden(name: str) -> bool:
    return name.startswith("_") or name in _NEVER


@cache
def _allowed(kind: type[Any]) -> frozenset[str]:
    """Return the names of the fields that a class of configs has or its model's code reads."""
    import transformers

    names = {name for name in vars(transformers.PretrainedConfig()) if not name.startswith("_")}
    names |= {"num_labels", "dtype", "torch_dtype", "tie_word_embeddings", *kind.attribute_map}
    for each in kind.__mro__[:-1]:
        names.update(_declared(each))
    names.update(_read_by_model(kind))
    return frozenset(names)


def _declared(kind: type[Any]) -> Iterator[str]:
    """Yield the fields of one class: its own, those that its constructor takes, and old names."""
    if dataclasses.is_dataclass(kind):
        yield from (field.name for field in dataclasses.fields(kind))
    for name in ("__init__", "__post_init__"):
        method = kind.__dict__.get(name)
        if method is not None:
            yield from inspect.signature(method).parameters
    try:
        yield from _POPPED.findall(inspect.getsource(kind))
    except (OSError, TypeError):  # without the source old names are not known
        return


def _read_by_model(kind: type[Any]) -> Iterator[str]:
    """Yield the fields that the code of transformers' own model reads from its config."""
    module = kind.__module__.replace(".configuration_", ".modeling_")
    if module == kind.__module__ or not module.startswith("transformers."):
        return
    spec = sys.modules[module].__spec__ if module in sys.modules else find_spec(module)
    if spec is None or spec.origin is None:
        return
    try:
        source = Path(spec.origin).read_text(encoding="utf-8")
    except OSError:
        return
    for names in _READ.findall(source):
        yield from filter(None, names)
