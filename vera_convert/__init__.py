"""Validate, strip, embed, migrate, merge and verify VeRA adapters of PEFT, exactly.

    read ──► understand ──► transform ──► publish ──► report
    files/   adapter/       conversion/   publish/    formats/
    hub/     base/          merging/                  cli

There is one function for each command. Their modules load when one is first used, so that
``import vera_convert`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module

from vera_convert._version import __version__

TYPE_CHECKING = False  # as in `typing`, which the program cannot wait for: a signal may come
if TYPE_CHECKING:
    from vera_convert.base.facts import BaseOptions
    from vera_convert.conversion.migration import Mode, TreeMigration, migrate, migrate_tree
    from vera_convert.conversion.projections import ProjectionSource
    from vera_convert.conversion.regeneration import Regenerated, regenerate, regenerate_for
    from vera_convert.conversion.strip_embed import Conversion, embed, strip
    from vera_convert.counting import Count, count
    from vera_convert.draws.generator import Rounding, Variant
    from vera_convert.errors import (
        CheckpointError,
        SurroundingsError,
        UsageError,
        VeraConvertError,
    )
    from vera_convert.hub.lookup import HubAccess
    from vera_convert.lora.conversion import LoraConversion, to_lora
    from vera_convert.lora.options import LoraOptions
    from vera_convert.merging.adapters import AdapterSpec
    from vera_convert.merging.changes import Tied
    from vera_convert.merging.merge import Merge, merge
    from vera_convert.merging.options import MergeOptions
    from vera_convert.schemas import load_schema, schema_names
    from vera_convert.summary import AdapterInfo, info
    from vera_convert.validation.validate import validate
    from vera_convert.validation.validation import Checked, Validation
    from vera_convert.verification.options import VerifyOptions
    from vera_convert.verification.result import Verification
    from vera_convert.verification.verify import verify

_MODULES = {
    "AdapterInfo": "summary",
    "AdapterSpec": "merging.adapters",
    "BaseOptions": "base.facts",
    "Checked": "validation.validation",
    "CheckpointError": "errors",
    "Conversion": "conversion.strip_embed",
    "Count": "counting",
    "HubAccess": "hub.lookup",
    "LoraConversion": "lora.conversion",
    "LoraOptions": "lora.options",
    "ProjectionSource": "conversion.projections",
    "Merge": "merging.merge",
    "MergeOptions": "merging.options",
    "Mode": "conversion.migration",
    "Regenerated": "conversion.regeneration",
    "Rounding": "draws.generator",
    "Tied": "merging.changes",
    "SurroundingsError": "errors",
    "TreeMigration": "conversion.migration",
    "UsageError": "errors",
    "Validation": "validation.validation",
    "Variant": "draws.generator",
    "VeraConvertError": "errors",
    "Verification": "verification.result",
    "VerifyOptions": "verification.options",
    "count": "counting",
    "embed": "conversion.strip_embed",
    "info": "summary",
    "load_schema": "schemas",
    "merge": "merging.merge",
    "migrate": "conversion.migration",
    "migrate_tree": "conversion.migration",
    "regenerate": "conversion.regeneration",
    "regenerate_for": "conversion.regeneration",
    "schema_names": "schemas",
    "strip": "conversion.strip_embed",
    "to_lora": "lora.conversion",
    "validate": "validation.validate",
    "verify": "verification.verify",
}

__all__ = [
    "AdapterInfo",
    "AdapterSpec",
    "BaseOptions",
    "Checked",
    "CheckpointError",
    "Conversion",
    "Count",
    "HubAccess",
    "LoraConversion",
    "LoraOptions",
    "Merge",
    "MergeOptions",
    "Mode",
    "ProjectionSource",
    "Regenerated",
    "Rounding",
    "SurroundingsError",
    "Tied",
    "TreeMigration",
    "UsageError",
    "Validation",
    "Variant",
    "VeraConvertError",
    "Verification",
    "VerifyOptions",
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
    "to_lora",
    "validate",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
