"""Run code of a test before and after every system call of publishing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vera_convert.publish import filesystem, staging

CALLS = [
    *((os, name) for name in ("mkdir", "open", "fsync", "close", "rename", "link")),
    *((os, name) for name in ("unlink", "rmdir")),
    (filesystem, "_rename_at_once"),
    (staging, "try_lock"),
]


def intercept(
    patch: Callable[[Any, str, object], None], act: Callable[[int, str, bool], None]
) -> None:
    """Call `act(number, name, done)` before and after each system call.

    If `act` raises an error, the system call raises the error. While a tree is removed, names begin
    with "removing: ".
    """
    number, removing = 0, ""

    def intercepted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal number
            number += 1
            mine = number
            act(mine, removing + name, False)
            try:
                return real(*arguments, **keywords)
            finally:
                act(mine, removing + name, True)

        return call

    def remove_tree(path: Path) -> None:
        nonlocal removing
        removing = "removing: "
        try:
            filesystem.remove_tree(path)
        finally:
            removing = ""

    for module, name in CALLS:
        patch(module, name, intercepted(name, getattr(module, name)))
    patch(staging, "remove_tree", remove_tree)
