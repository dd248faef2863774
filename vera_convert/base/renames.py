"""Rename a base's layers as each release of transformers names the layers in memory.

transformers renames layers from time to time, keeps the names in the files, and translates on
loading. An adapter's keys are the names in memory of the release that trained the adapter. A
strategy leads from the names of one release to the names in the files.

    files (of any release) ──► today's names ──► each release's names ──► the adapter's
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, combinations
from types import MappingProxyType
from typing import NamedTuple

from vera_convert.base.model import BaseModel
from vera_convert.base.rename_table import Family, conversions, families
from vera_convert.base.templates import (
    BODY,
    Paths,
    Templates,
    Translation,
    parents_in_files,
    with_each_number,
    with_parents,
)
from vera_convert.text import printable

_MOST_FAMILIES = 4
_MOST_TYPES = 16
_MOST_TEMPLATES = 20_000
"""The most layers that differ in more than numbers; a limit on the work for a hostile base."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """A function from the path of a layer in an adapter to the path in a base's files.

    Attributes:
        name: the name in output and messages.
        rename: from the path in the adapter to the path in the files; None if the name belongs to
            another strategy.
        undo: from the path in the files to the path in the adapter; None if the adapter's model has
            no such layer.
        key_map: the OLD=NEW that does the same; empty if there is none.
        is_given: whether the user gave the key map: the base's model has the new names.
        around: from the path of a module with several layers to the path in the files; None if
            `rename` does the same.
    """

    name: str
    rename: Callable[[str], str | None]
    undo: Callable[[str], str | None]
    key_map: str = ""
    is_given: bool = False
    around: Callable[[str], str] | None = None

    def in_memory(self, name: str) -> str:
        """Return the name of a tensor of the files in the adapter's model.

        A tensor that the adapter's model lacks keeps the name.
        """
        own = self.undo(name)  # some classes rename a tensor and not the module of the tensor
        if own is not None and own != name:
            return own
        path, dot, parameter = name.rpartition(".")
        return f"{self.undo(path) or path}{dot}{parameter}"


def release_names(base: BaseModel) -> Iterator[Strategy]:
    """Yield a strategy for each set of names that releases of transformers use for a base's layers.

    Nothing is yielded if no release renames a layer, if the config names no known model type, or
    if two layers would get the same name.
    """
    templates = Templates(base.model_type or "")
    paths = Paths(_renamable(base, templates), templates)
    for naming in _namings(base, paths.templates):
        in_memory = paths.renamed(naming.names)
        on_disk = {name: path for path, name in in_memory.items()}
        if len(on_disk) == len(in_memory):
            like_files = partial(templates.translated, naming.to_files)
            rename = partial(_path_on_disk, on_disk, in_memory, like_files)
            around = partial(with_parents, naming.to_files, parents_in_files(naming.names))
            yield Strategy(
                naming.title, rename, in_memory.get, around=partial(templates.translated, around)
            )


def _renamable(base: BaseModel, templates: Templates) -> Iterator[str]:
    """Yield the path of each module, and the name of each tensor that a class can rename whole.

    Some classes rename a tensor beside weights and biases to the bias of a layer. A table states
    the weights and biases that a class renames to other tensors.
    """
    for name in base.tensors:
        module, _, last = name.rpartition(".")
        yield module
        if last not in ("weight", "bias") or templates.states(name):
            yield name


def _path_on_disk(
    on_disk: Mapping[str, str],
    in_memory: Mapping[str, str],
    like_files: Callable[[str], str],
    module: str,
) -> str | None:
    """Return the path of a layer in the files.

    A layer that the base lacks gets the path that the base's files would use. If another release
    uses the name for a layer of the base, the result is None: releases never mix.
    """
    if module in on_disk:
        return on_disk[module]
    path = like_files(module)
    return None if path in in_memory else path


def other_names(base: BaseModel, paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of layers in a base's files and in the memory of each release.

    Args:
        base: the base.
        paths: the paths of the layers in the base's files.
    """
    templates = Templates(base.model_type or "")
    all_paths = Paths((name.rpartition(".")[0] for name in base.tensors), templates)
    some = Paths(paths, templates)
    found = {path: [path] for path in some}
    for naming in _namings(base, all_paths.templates | some.templates):
        for path, name in some.renamed(naming.names).items():
            found[path].append(name)
    return found


def model_types(config: Mapping[str, object]) -> list[str]:
    """Return the ``model_type`` of a config, and those of its parts at any depth.

    The outermost types come first. At most `_MOST_TYPES` are returned, because every layer is
    compared with the names of each type; real models have at most ten types.
    """
    found: dict[str, None] = {}
    parts: deque[Mapping[str, object]] = deque([config])
    while parts and len(found) < _MOST_TYPES:
        part = parts.popleft()
        kind = part.get("model_type")
        if isinstance(kind, str):
            found[kind] = None
        parts.extend(value for value in part.values() if isinstance(value, Mapping))
    return [*found]


def _families(base: BaseModel) -> list[Family]:
    types = set(model_types(base.config))
    vision = base.config.get("vision_config")
    is_told = isinstance(vision, Mapping) and "model_type" in vision
    return [
        family
        for family in families()
        if types & family.types or (types & family.also and not is_told)
    ]


class _Naming(NamedTuple):
    """The names that a release uses for layers, as templates.

    Attributes:
        title: the name for people.
        names: template in memory by template in the files.
        to_files: from the template in memory of a layer that the base lacks to the template that
            the base's files would use.
    """

    title: str
    names: Mapping[str, str]
    to_files: Translation


def _namings(base: BaseModel, templates: AbstractSet[str]) -> Iterator[_Naming]:
    """Yield each set of names that differs from the names in the files, once."""
    if len(templates) > _MOST_TEMPLATES:  # a model of a known type has about a hundred
        return
    seen = [{template: template for template in templates}]
    for title, translate, back in chain(
        _of_families(base, templates), _of_whole_models(base.model_type or "")
    ):
        names = {template: translate(template) for template in templates}
        if names not in seen:
            seen.append(names)
            yield _Naming(title, names, back)


def _of_families(
    base: BaseModel, templates: Collection[str]
) -> Iterator[tuple[str, Translation, Translation]]:
    """Yield for each release the title, the translation of files' names, and the way back."""
    families, former_in_files = _concerned(_families(base), templates)
    for former, taken in _states(families):
        yield (
            _title(taken, former),
            partial(with_each_number, _translation(taken, former)),
            _once(partial(with_each_number, _translation(taken, former_in_files))),
        )


def _of_whole_models(kind: str) -> Iterator[tuple[str, Translation, Translation]]:
    """Yield each generated table of a model type and the inverse, with and without ``model.``.

    Published files can lack the prefix in a part of the names.
    """
    for table in conversions().get(kind, ()):
        short = {files.removeprefix(BODY): memory for files, memory in table.items()}
        yield from _both_ways(kind, table)
        if len(short) == len(table):
            added = f', prefix "{BODY}" added'
            yield from _both_ways(kind, short, added)
            yield from _both_ways(kind, table, f"{added} where absent", tolerated=short)


def _both_ways(
    kind: str,
    table: Mapping[str, str],
    prefix: str = "",
    *,
    tolerated: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[str, Translation, Translation]]:
    """Yield a table of names in memory by names in the files, and the inverse.

    Args:
        kind: the model type.
        table: the path in memory by the path in the files.
        prefix: the end of the title.
        tolerated: further forms in files; a layer is never renamed to a further form.
    """
    to_memory = _once(partial(_looked_up, {**tolerated, **table}))
    to_files = _once(partial(_looked_up, {memory: files for files, memory in table.items()}))
    names = f"names of {printable(kind)}"
    yield f"{names} since transformers 5{prefix}", to_memory, to_files
    yield f"{names} before transformers 5{prefix}", to_files, to_memory


def _once(translate: Translation) -> Translation:
    """Let each template be translated once: an adapter has many layers and few templates."""
    return lru_cache(_MOST_TEMPLATES)(translate)


def _looked_up(table: Mapping[str, str], template: str) -> str:
    return table.get(template) or with_each_number(lambda full: table.get(full, full), template)


def _concerned(
    families: Iterable[Family], templates: Collection[str]
) -> tuple[list[Family], set[str]]:
    """Return the families that rename a layer, and the families whose former names the base has."""
    concerned, former = [], set()
    for family in families:
        renamed = {_to_memory(template, family) for template in templates}
        if renamed != templates:
            former.add(family.name)
        if renamed != templates or renamed != {_to_files(name, family) for name in renamed}:
            concerned.append(family)
        templates = renamed
    return concerned, former


def _states(families: Sequence[Family]) -> Iterator[tuple[frozenset[str], Sequence[Family]]]:
    """Yield the families with former names, and the families that apply, for each possible release.

    Releases renamed one family after the other, so any set of families can have former names. An
    optional family can be absent.
    """
    optional = [family for family in families if family.optional]
    fixed = [family for family in families if not family.optional]
    for present in _subsets(optional):
        taken = [family for family in families if family in fixed or family in present]
        for former in _subsets(fixed):
            yield frozenset(family.name for family in former), taken


def _subsets(families: Sequence[Family]) -> Iterator[Sequence[Family]]:
    sizes = range(len(families) + 1)
    if len(families) > _MOST_FAMILIES:  # a limit on the work for a hostile config
        sizes = range(0, len(families) + 1, len(families))
    for size in sizes:
        yield from combinations(families, size)


def _title(taken: Iterable[Family], former: Collection[str]) -> str:
    parts = [
        f"{family.name} {'before' if family.name in former else 'since'} "
        f"transformers {family.since}"
        for family in taken
    ]
    return f"names of {' and '.join(parts)}"


# --- names ---------------------------------------------------------------------------------------


def _translation(families: Sequence[Family], former: Collection[str]) -> Callable[[str], str]:
    """Return the function that renames a template, with these families under former names."""

    def translate(template: str) -> str:
        for family in families:
            template = _to_memory(template, family)
        for family in reversed(families):
            if family.name in former:
                template = _to_files(template, family)
        return template

    return translate


def _to_memory(template: str, family: Family) -> str:
    for files, memory in (*family.renames, *family.tolerated):
        template = _replaced(template, files, memory)
    return template


def _to_files(template: str, family: Family) -> str:
    for files, memory in reversed(family.renames):
        template = _replaced(template, memory, files)
    return template


def _replaced(path: str, old: str, new: str) -> str:
    """Replace the parts `old` of a path by `new` once, unless the path already has `new`."""
    dotted, old_part, new_part = f".{path}.", f".{old.lstrip('^')}.", f".{new.lstrip('^')}."
    if old_part in new_part and new_part in dotted:
        return path
    if old.startswith("^") and not dotted.startswith(old_part):
        return path
    return dotted.replace(old_part, new_part, 1).strip(".")
