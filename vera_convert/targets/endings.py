"""Names that module paths end with, searched as a tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Endings:
    """Names, each of which matches an equal path and every path that ends with a dot and the name.

    The names are a tree of elements, the last element first. A search takes as many steps as the
    path has elements, however many names there are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._tree: dict[str, Any] = {}
        for name in names:
            node = self._tree
            for element in reversed(name.split(".")):
                node = node.setdefault(element, {})
            node[_END] = name

    def of(self, path: str) -> Iterator[str]:
        """Yield each name that a path equals or ends with, the shortest first."""
        return (node[_END] for _, node in self._walk(path) if _END in node)

    def has(self, path: str) -> bool:
        """Say whether a path equals or ends with any name."""
        return any(_END in node for _, node in self._walk(path))

    def suffixes(self, path: str) -> Iterator[str]:
        """Yield the endings that a path shares with any name, the shortest first."""
        parts = path.split(".")
        return (".".join(parts[-count:]) for count, _ in self._walk(path))

    def _walk(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
        node = self._tree
        for count, element in enumerate(reversed(path.split(".")), 1):
            if element not in node:
                return
            node = node[element]
            yield count, node


_END = "."
"""Marks where a name ends; no element has a dot."""
