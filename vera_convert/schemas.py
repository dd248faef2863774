"""The JSON Schemas of this package: a schema for each document that a command reads or writes."""

from __future__ import annotations

import json
from pathlib import Path

from vera_convert.errors import UsageError

_PACKAGE = Path(__file__).parent


class UnknownSchemaError(UsageError, ValueError):
    """No schema has this name."""


def schema_names() -> tuple[str, ...]:
    """Return the names that `load_schema` knows, in order.

    Example:
        >>> "adapter_config" in schema_names()
        True
    """
    return tuple(sorted(path.stem for path in _folder().glob("*.json")))


def load_schema(name: str) -> dict[str, object]:
    """Return the schema (draft 2020-12) called `name`, such as ``adapter_config``.

    Args:
        name: a name that `schema_names` returns.

    Raises:
        UnknownSchemaError: no schema has this name.

    Example:
        >>> load_schema("info")["type"]
        'object'
    """
    if name not in schema_names():
        known = ", ".join(schema_names())
        raise UnknownSchemaError(f"no schema is called {name!r}; the names are {known}")
    text = (_folder() / f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, object] = json.loads(text)
    return schema


def _folder() -> Path:
    """Return where the schemas lie: inside an installed package, beside it in the repository."""
    inside = _PACKAGE / "schemas"
    return inside if inside.is_dir() else _PACKAGE.parent / "schemas"
