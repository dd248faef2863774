"""Validate, convert, merge and verify VeRA adapters of PEFT, bit for bit.

    read ──► understand ──► transform ──► publish ──► report
    files/   adapter/       conversion/   publish/    formats/
    hub/     base/          merging/                  cli

There is one function for each command. The modules of the functions load with the first use, so
``import vera_convert`` costs next to nothing. The less this module imports, the sooner the program
handles signals.
"""

from __future__ import annotations

from vera_convert._version import __version__ as __version__


def __getattr__(name: str) -> object:
    if name == "__all__":
        return __dir__()
    if name.startswith("__") or name not in (modules := _public_modules()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(modules[name]), name)


def __dir__() -> list[str]:
    return list(_public_modules())


def _public_modules() -> dict[str, str]:
    """Return the module of each public name, as the stub beside this file lists the names."""
    with open(f"{__file__.removesuffix('.py')}.pyi", encoding="ascii") as stub:  # noqa: PTH123
        lines = [line.split() for line in stub if line.startswith("from ")]
    return {words[3]: words[1] for words in lines}
