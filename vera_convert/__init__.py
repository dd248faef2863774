"""Validate, strip, embed, migrate, merge and verify VeRA adapters of PEFT, exactly.

    read ──► understand ──► transform ──► publish ──► report
    files/   adapter/       conversion/   publish/    formats/
    hub/     base/          merging/                  cli

There is one function for each command. Their modules load when one is first used, so that
``import vera_convert`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from vera_convert._version import __version__ as __version__


def _public_names() -> dict[str, str]:
    """Return the module of each public name, as the stub beside this file lists the names."""
    stub = Path(__file__).with_suffix(".pyi").read_text(encoding="ascii")
    lines = (line.split() for line in stub.splitlines() if line.startswith("from "))
    return {words[3]: words[1] for words in lines}


_MODULES = _public_names()
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
