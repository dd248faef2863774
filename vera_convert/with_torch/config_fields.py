"""Select the fields of a stranger's config that transformers may read.

    field ── renamed by the class ──► declared, or read by the model's code? ──► kept

All other fields are left out. Some of these name code, attention kernels or remote weights, hide a
quantizer, or rename fields (`attribute_map`).
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
"""Names that are always left out, like all names with a leading `_`, even if a class declares one.

`model_type` selects the class that reads a config, and is not a field of the class.
"""
_POPPED = re.compile(r"(?:kwargs|config_dict)\.(?:pop|get)\(\s*[\"'](\w+)")
_READ = re.compile(r"(?<=config\.)[a-zA-Z]\w*|(?<=config, [\"'])[a-zA-Z]\w*")
_QUOTED = re.compile(r"(?<=[\"'])[a-zA-Z]\w*(?=[\"'])")
_DEEPEST = 8
"""How many configs can be nested: real configs have three levels."""


def known_fields(
    kind: type[Any], document: Mapping[str, object], outer: tuple[type[Any], ...] = ()
) -> dict[str, object]:
    """Return the fields of a config and of nested configs that the classes know.

    Args:
        kind: the class of transformers that reads the config.
        document: the stored config.
        outer: the classes of the configs around this config.
    """
    allowed = _allowed(kind).union(*map(_for_nested, outer))  # type: ignore[arg-type] # hashable
    renames: Mapping[str, str] = kind.attribute_map
    found: dict[str, object] = {}
    for name, value in document.items():
        field = renames.get(name, name)
        if not {name, field} <= allowed or _is_forbidden(name) or _is_forbidden(field):
            continue
        if isinstance(value, Mapping):
            found[name] = _nested(kind, name, value, outer)
        else:
            found[name] = value
    return found


def _nested(
    kind: type[Any], name: str, value: Mapping[str, object], outer: tuple[type[Any], ...]
) -> object:
    """Return the known fields of a nested config, or a plain record without forbidden names."""
    if len(outer) >= _DEEPEST:
        return {}
    if name == "per_layer_config":  # single layers differ in some fields of the model's config
        return {
            layer: known_fields(kind, fields, (*outer, kind))
            if isinstance(fields, Mapping)
            else fields
            for layer, fields in value.items()
        }
    inner = _nested_class(kind, name, value)
    if inner is None:
        return _plain(value, len(outer) + 1)
    model_type = {"model_type": value["model_type"]} if "model_type" in value else {}
    return model_type | known_fields(inner, value, (*outer, kind))


def _nested_class(kind: type[Any], name: str, value: Mapping[str, object]) -> type[Any] | None:
    """Return the class that reads a nested config; None if the field is a plain record."""
    import transformers

    declared = dict(getattr(kind, "sub_configs", None) or {}).get(name)
    model_type = value.get("model_type")
    is_known = isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING
    if declared is None and not is_known:
        return None
    found: Any = transformers.CONFIG_MAPPING[model_type] if is_known else declared
    plain: type[Any] = transformers.PretrainedConfig
    try:  # AutoConfig without a known type knows only the fields of all configs
        return found if hasattr(found, "attribute_map") else plain
    except ImportError:  # the class needs a library that is not installed
        return plain


def _plain(value: object, depth: int) -> object:
    """Return a record, such as that of rotary positions, without forbidden names."""
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
    """Return the fields that a config class declares or the code of the model reads."""
    import transformers

    names = {name for name in vars(transformers.PretrainedConfig()) if not name.startswith("_")}
    names |= {"num_labels", "dtype", "torch_dtype", "tie_word_embeddings", *kind.attribute_map}
    for each in kind.__mro__[:-1]:
        names.update(_declared(each))
    return frozenset(names | _read_by_model(kind))  # type: ignore[arg-type] # hashable


@cache
def _for_nested(kind: type[Any]) -> frozenset[str]:
    """Return the names that a config class, or the code of the model, uses for nested configs.

    The class of a nested config can lack these names: DETR's backbones pass fields on to timm.
    """
    return frozenset(_QUOTED.findall(_source(kind))) | _read_by_model(kind)  # type: ignore[arg-type]


def _declared(kind: type[Any]) -> Iterator[str]:
    """Yield the fields of one class, the arguments of its constructor, and former names."""
    if dataclasses.is_dataclass(kind):
        yield from (field.name for field in dataclasses.fields(kind))
    for name in ("__init__", "__post_init__"):
        method = kind.__dict__.get(name)
        if method is not None:
            yield from inspect.signature(method).parameters
    yield from _POPPED.findall(_source(kind))


def _source(kind: type[Any]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # a class without source code
        return ""


@cache
def _read_by_model(kind: type[Any]) -> frozenset[str]:
    """Return the fields that transformers' code of the model reads from configs."""
    module = kind.__module__.replace(".configuration_", ".modeling_")
    if module == kind.__module__ or not module.startswith("transformers."):
        return frozenset()
    spec = sys.modules[module].__spec__ if module in sys.modules else find_spec(module)
    if spec is None or spec.origin is None:
        return frozenset()
    try:
        source = Path(spec.origin).read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(_READ.findall(source))
