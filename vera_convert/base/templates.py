"""Templates of paths: a path in which # stands for the number of each layer.

A model has thousands of paths and about a hundred templates, and a rename changes the template
alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import add

from vera_convert.base.rename_table import conversions

Translation = Callable[[str], str]
"""A function that renames a template."""
BODY = "model."
"""The prefix that a class with a head puts before the model; files can lack the prefix."""

_NUMBER = re.compile(r"(?<![^.])(?:\d+|#)(?![^.])")
_PLACE = re.compile(r"(?<![^.])#(?![^.])")


class Templates:
    """Divides a path into a template, in which # stands for the number of a layer, and the numbers.

    Some files have a number where memory has a name, like ``proj.0`` for ``proj.linear_1``. A
    number at such a place of a table is a name: the number stays in the template.
    """

    def __init__(self, kind: str) -> None:
        tables = conversions().get(kind, ())
        names = {name for table in tables for row in table.items() for name in row}
        names |= {name.removeprefix(BODY) for name in names}
        self._named: dict[str, list[list[str]]] = {}
        for name in sorted(names):
            numbers = _NUMBER.findall(name)
            if any(number != "#" for number in numbers):
                self._named.setdefault(_NUMBER.sub("#", name), []).append(numbers)
        self._tensors = {name for name in names if name.endswith(("weight", "bias"))}

    def divided(self, path: str) -> tuple[str, list[str]]:
        """Return the template of a path, and the numbers for which # stands."""
        full, numbers = _NUMBER.sub("#", path), _NUMBER.findall(path)
        for named in self._named.get(full, ()):
            pairs = [*zip(named, numbers, strict=True)]
            if all(name in ("#", number) for name, number in pairs):
                template = _filled(_PLACE.split(full), named)
                return template, [number for name, number in pairs if name == "#"]
        return full, numbers

    def states(self, name: str) -> bool:
        """Say whether a table has the name of this weight or bias, not the path of its module."""
        return bool(self._tensors) and self.divided(name)[0] in self._tensors

    def translated(self, translate: Translation, path: str) -> str:
        """Return a path with the template translated and the numbers in the same order."""
        template, numbers = self.divided(path)
        return _filled(_PLACE.split(translate(template)), numbers)


class Paths:
    """Paths by their templates; a model has few templates."""

    def __init__(self, paths: Iterable[str], templates: Templates) -> None:
        self._parts = {path: templates.divided(path) for path in dict.fromkeys(paths) if path}
        self.templates = frozenset(template for template, _ in self._parts.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def renamed(self, names: Mapping[str, str]) -> dict[str, str]:
        """Return each path with the template replaced and the numbers in the same order."""
        pieces = {template: _PLACE.split(names[template]) for template in self.templates}
        return {
            path: _filled(pieces[template], numbers)
            for path, (template, numbers) in self._parts.items()
        }


def with_each_number(translate: Translation, template: str) -> str:
    """Translate a template whose numbers are names as if the numbers were numbers of layers."""
    full, numbers = _NUMBER.sub("#", template), _NUMBER.findall(template)
    return _filled(_PLACE.split(translate(full)), numbers)


def _filled(pieces: Sequence[str], numbers: Iterable[str]) -> str:
    """Put the numbers of one path between the pieces of another."""
    first, *rest = pieces
    return first + "".join(map(add, numbers, rest))


def parents_in_files(names: Mapping[str, str]) -> dict[str, str]:
    """Return the template in the files of each module around renamed modules, by that in memory.

    The modules inside show where the module around them lies, if they keep their own names. A
    module whose parts lie in several modules of the files is left out.

    >>> parents_in_files({"layers.#.ffn.gate": "layers.#.mlp.gate", "norm": "norm"})
    {'layers.#.mlp': 'layers.#.ffn'}
    """
    found: dict[str, set[str]] = {}
    for on_disk, in_memory in names.items():
        theirs, ours = on_disk.split("."), in_memory.split(".")
        while theirs and ours and theirs.pop() == ours.pop():
            found.setdefault(".".join(ours), set()).add(".".join(theirs))
    alone = {ours: theirs.pop() for ours, theirs in found.items() if len(theirs) == 1}
    return {ours: theirs for ours, theirs in alone.items() if ours != theirs}


def with_parents(translate: Translation, parents: Mapping[str, str], template: str) -> str:
    """Translate a template; a template without a translation follows the modules around it."""
    translated = translate(template)
    if translated != template:
        return translated
    parts = template.split(".")
    for size in range(len(parts), 0, -1):
        parent = parents.get(".".join(parts[:size]))
        if parent is not None:
            return ".".join((parent, *parts[size:]))
    return template
