"""A hand on every system call that publishing makes."""

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
    """Have `act(number, name, done)` called before and after each; what it raises, the call raises.

    The names of those that remove a tree begin with "removing: ".
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
