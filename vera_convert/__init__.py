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
    from vera_convert.mergeinputs import AdapterWish
    from vera_convert.mergeoptions import MergeOptions
    from vera_convert.mergeparts import Tied
    from vera_convert.merging import Merge, merge
    from vera_convert.migration import Mode, TreeMigration, migrate, migrate_tree
    from vera_convert.onbase import BaseWish
    from vera_convert.projections import Meant
    from vera_convert.regeneration import Regenerated, regenerate, regenerate_for
    from vera_convert.schemas import load_schema, schema_names
    from vera_convert.summary import AdapterInfo, info

_MODULES = {
    "AdapterInfo": "summary",
    "AdapterWish": "mergeinputs",
    "BaseWish": "onbase",
    "Conversion": "conversion",
    "Count": "counting",
    "HubAccess": "hub",
    "Meant": "projections",
    "Merge": "merging",
    "MergeOptions": "mergeoptions",
    "Mode": "migration",
    "Regenerated": "regeneration",
    "Rounding": "generator",
    "Tied": "mergeparts",
    "TreeMigration": "migration",
    "Variant": "generator",
    "count": "counting",
    "embed": "conversion",
    "info": "summary",
    "load_schema": "schemas",
    "merge": "merging",
    "migrate": "migration",
    "migrate_tree": "migration",
    "regenerate": "regeneration",
    "regenerate_for": "regeneration",
    "schema_names": "schemas",
    "strip": "conversion",
}

__all__ = [
    "AdapterInfo",
    "AdapterWish",
    "BaseWish",
    "CheckpointError",
    "Conversion",
    "Count",
    "HubAccess",
    "Meant",
    "Merge",
    "MergeOptions",
    "Mode",
    "Regenerated",
    "Rounding",
    "SurroundingsError",
    "Tied",
    "TreeMigration",
    "UsageError",
    "Variant",
    "VeraConvertError",
    "__version__",
    "count",
    "embed",
    "info",
    "load_schema",
    "merge",
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
