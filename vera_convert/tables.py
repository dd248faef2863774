"""Read the tables of facts that lie as ``.toml`` files beside the modules."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def table(module: str, name: str) -> Mapping[str, Any]:
    """Return the value of a ``.toml`` file.

    Args:
        module: the ``__file__`` of a module in the same folder.
        name: the name of the file.
    """
    import tomllib  # `--help` reads no table

    return tomllib.loads(Path(module).with_name(name).read_text(encoding="utf-8"))
