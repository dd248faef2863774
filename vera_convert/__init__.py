"""Read, strip, embed, migrate and count VeRA adapters of PEFT, exactly and without PyTorch.

    read ──► understand ──► transform ──► publish ──► report
    files    adapter        projections   publish     summary, formats
    header   onbase         repairs                   cli

There is one function for each command. Their modules load when one is first used, so that
``import vera_convert`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vera_convert._version import __version__
from vera_convert.errors import (
    CheckpointError,
    SurroundingsError,
    UsageError,
    VeraConvertError,
)

if TYPE_CHECKING:
    from vera_convert.conversion import Conversion, embed, strip
    from vera_convert.counting import Count, count
    from vera_convert.generator import Rounding, Variant
    from vera_convert.hub import HubAccess
    from vera_convert.migration import Mode, TreeMigration, migrate, migrate_tree
    from vera_convert.onbase import BaseWish
    from vera_convert.projections import Meant
    from vera_convert.regeneration import Regenerated, regenerate, regenerate_for
    from vera_convert.schemas import load_schema, schema_names
    from vera_convert.summary import AdapterInfo, info

_MODULES = {
    "AdapterInfo": "summary",
    "BaseWish": "onbase",
    "Conversion": "conversion",
    "Count": "counting",
    "HubAccess": "hub",
    "Meant": "projections",
    "Mode": "migration",
    "Regenerated": "regeneration",
    "Rounding": "generator",
    "TreeMigration": "migration",
    "Variant": "generator",
    "count": "counting",
    "embed": "conversion",
    "info": "summary",
    "load_schema": "schemas",
    "migrate": "migration",
    "migrate_tree": "migration",
    "regenerate": "regeneration",
    "regenerate_for": "regeneration",
    "schema_names": "schemas",
    "strip": "conversion",
}

__all__ = [
    "AdapterInfo",
    "BaseWish",
    "CheckpointError",
    "Conversion",
    "Count",
    "HubAccess",
    "Meant",
    "Mode",
    "Regenerated",
    "Rounding",
    "SurroundingsError",
    "TreeMigration",
    "UsageError",
    "Variant",
    "VeraConvertError",
    "__version__",
    "count",
    "embed",
    "info",
    "load_schema",
    "migrate",
    "migrate_tree",
    "regenerate",
    "regenerate_for",
    "schema_names",
    "strip",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
