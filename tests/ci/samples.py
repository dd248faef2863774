"""A good and a bad adapter for the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapterdefects import Q_B, without
from adapters import good_adapter

Git = Callable[..., str]
"""A function that runs git: ``git(folder, "status")``."""

BAD = "V202"
"""The code of the bad adapter's finding."""


def adapters(folder: Path) -> Path:
    """Write a good adapter, and an adapter that lacks a tensor, into a new folder."""
    good_adapter(folder / "good" / "adapter one")
    without(Q_B)(good_adapter(folder / "bad" / "adapter two"))
    return folder
