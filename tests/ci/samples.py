"""What the tests beside it check: a good and a bad adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapterdefects import Q_B, without
from adapters import good_adapter

Git = Callable[..., str]
"""Runs git: ``git(folder, "status")``."""

BAD = "V202"
"""What is found in the bad one."""


def adapters(folder: Path) -> Path:
    """Write a good adapter and one that lacks a tensor into a new folder."""
    good_adapter(folder / "good" / "adapter one")
    without(Q_B)(good_adapter(folder / "bad" / "adapter two"))
    return folder
