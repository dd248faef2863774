"""Tell which layers of a model PEFT adapts with VeRA, and the dims of the shared A and B.

The module follows PEFT's rules, with the differences between releases. Module names, kinds of
layers and the config decide. `count`, the shapes of A and B, and the layer in torch use this one
implementation.

    target_modules ── resolve ──► names or a regex ── matching ──► adapted layers ──► A's, B's dims
     null, all-linear                    layers_to_transform, modules_to_save
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.arguments import NEWEST_PEFT
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.tables import table
from vera_convert.targets.linear import Linear, ModelLayers
from vera_convert.targets.patterns import Pattern, search
from vera_convert.text import printable

Version = tuple[int, int]


class Adapted(NamedTuple):
    """The layers that PEFT adapts, and the dims of A and B.

    Attributes:
        layers: adapted layers by module path, in the model's order.
        max_in: columns of A, which is (r, max_in).
        max_out: rows of B, which is (max_out, r).
        only_sized: layers that count for the dims and are not adapted.
    """

    layers: Mapping[str, Linear]
    max_in: int
    max_out: int
    only_sized: Mapping[str, Linear] = MappingProxyType({})

    @property
    def dims(self) -> tuple[int, int]:
        """Columns of A and rows of B."""
        return self.max_in, self.max_out


def adapted(model: ModelLayers, config: VeraConfig, *, peft: Version = NEWEST_PEFT) -> Adapted:
    """Tell which layers of `model` PEFT adapts for `config`, and the dims of A and B.

    PEFT first sizes A and B, then condenses a long list of names to suffixes, and then adapts
    layers. With `layers_to_transform`, which acts on suffixes alone, the layers that give the dims
    and the adapted layers can differ.

    Raises:
        CheckpointError: nothing matches, no targets are known, or a pattern is invalid or slow.
        SurroundingsError: the process that evaluates a regular expression did not start.
    """
    names = list(model.linear)
    targets = resolve(model, config, peft=peft)
    sized_by = matching(names, replace(config, target_modules=targets), peft=peft)
    adapted_names = sized_by
    if not isinstance(targets, str) and _limits_layers(config):
        suffixes = condensed(names, targets, peft=peft)
        adapted_names = matching(names, replace(config, target_modules=suffixes), peft=peft)
    if not adapted_names:
        wanted = printable(targets if isinstance(targets, str) else ", ".join(targets))
        reason = (
            f"{wanted or 'an empty list'} matches none of the {len(names)} linear layers "
            f"({model.source})."
        )
        raise CheckpointError(rules.TARGETS_MATCH_NOTHING.at(CONFIG_NAME, reason))
    layers = {name: model.linear[name] for name in adapted_names}
    return Adapted(
        layers=layers,
        max_in=max(model.linear[name].in_features for name in sized_by),
        max_out=max(model.linear[name].out_features for name in sized_by),
        only_sized={name: model.linear[name] for name in sized_by if name not in layers},
    )


# --- which names are meant -----------------------------------------------------------------------


@cache
def default_targets() -> Mapping[str, tuple[str, ...] | str]:
    """Return the default targets of PEFT 0.21, by the base's model_type."""
    return {
        kind: targets if isinstance(targets, str) else tuple(targets)
        for kinds, targets in table(__file__, "default_targets.toml").items()
        for kind in kinds.split()
    }


def resolve(
    model: ModelLayers, config: VeraConfig, *, peft: Version = NEWEST_PEFT
) -> tuple[str, ...] | str:
    """Return the resolved `target_modules`: names, or a regular expression for full names.

    Null becomes the default of the model's type, all-linear the list of its linear layers.

    Raises:
        CheckpointError: null, and the model's type has no default.
    """
    targets = config.target_modules
    if targets is None:
        kind = model.model_type or ""
        if kind not in default_targets():
            known = (
                f"its model_type is {printable(kind)}" if kind else "its model_type is not known"
            )
            raise CheckpointError(rules.TARGETS_UNKNOWN.at(CONFIG_NAME, f"{known}."))
        targets = default_targets()[kind]
    if is_all_linear(targets):
        return _all_linear(model, config.task_type, peft=peft)
    return targets


def is_all_linear(targets: tuple[str, ...] | str | None) -> bool:
    """Return whether `target_modules` is PEFT's word for all linear layers, in any case."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _all_linear(model: ModelLayers, task_type: str | None, *, peft: Version) -> tuple[str, ...]:
    left_out = set(model.output_heads)
    if not left_out and task_type == "SEQ_CLS" and peft >= (0, 13):
        # PEFT looks for one classifier; a container of this name leaves all its layers in.
        parts = {name.partition(".")[0] for name in model.linear}
        left_out |= {next((head for head in ("score", "classifier") if head in parts), "")}
    if peft < (0, 15):
        # Last path elements, from which the full names of the heads are taken: a nested head stays.
        names = dict.fromkeys(name.rpartition(".")[2] for name in model.linear)
    else:
        names = dict.fromkeys(model.linear)
    return tuple(name for name in names if name not in left_out)


def condensed(
    names: Sequence[str], targets: tuple[str, ...], *, peft: Version = NEWEST_PEFT
) -> tuple[str, ...]:
    """Return a list of 20 names or more as the shortest suffixes that match nothing else.

    Args:
        names: the paths of modules, without the modules around them.
        targets: the list.
        peft: the release of PEFT.
    """
    listed = set(targets)
    if peft < (0, 13) or len(listed) < 20:
        return targets
    endings = Endings(listed)
    others = {
        suffix
        for name in names
        for path in accumulate(name.split("."), "{}.{}".format)
        if not endings.has(path)
        for suffix in endings.suffixes(path)
    }
    shortest = (
        next((suffix for suffix in endings.suffixes(target) if suffix not in others), None)
        for target in targets
    )
    found = tuple(dict.fromkeys(suffix for suffix in shortest if suffix is not None))
    return found if 0 < len(found) < len(listed) else targets


# --- which modules have such a name --------------------------------------------------------------


def matching(names: Sequence[str], config: VeraConfig, *, peft: Version = NEWEST_PEFT) -> list[str]:
    """Return the names that a config with resolved targets adapts, in order.

    Raises:
        CheckpointError: a pattern is no regular expression, or takes more than two seconds.
        SurroundingsError: the process that evaluates the pattern did not start.
    """
    kept = _not_saved_whole(names, config, peft=peft)
    targets = config.target_modules
    if isinstance(targets, str):
        found = search([Pattern("target_modules", targets, full=True)], kept)[0]
        return [name for name, hit in zip(kept, found, strict=True) if hit is not None]
    listed = set(targets or ())
    matched = [*filter(Endings(listed).has, kept)]
    if not _limits_layers(config):
        return matched
    by_suffix = [name for name in matched if name not in listed]
    limit = config.layers_to_transform
    numbers = {*limit} if isinstance(limit, tuple) else {limit}
    allowed = {
        name
        for name, index in zip(by_suffix, _indices(by_suffix, config, peft=peft), strict=True)
        if index in numbers
    }
    return [name for name in matched if name in listed or name in allowed]


def _not_saved_whole(names: Sequence[str], config: VeraConfig, *, peft: Version) -> list[str]:
    """Leave out the modules that modules_to_save names, and all modules below these."""
    saved = config.saved_modules
    if peft < (0, 16) or not saved:
        return list(names)
    plain = {name for name in saved if _is_plain(name)}
    kept = [name for name in names if plain.isdisjoint(name.split("."))]
    patterns = [
        Pattern("modules_to_save", rf"(^|.*\.){name}($|\..*)")
        for name in saved
        if not _is_plain(name)
    ]
    hits = search(patterns, kept)
    return [name for at, name in enumerate(kept) if all(found[at] is None for found in hits)]


def _limits_layers(config: VeraConfig) -> bool:
    return config.layers_to_transform is not None and config.layers_to_transform != ()


def _indices(names: Sequence[str], config: VeraConfig, *, peft: Version) -> list[int | None]:
    """Return the layer number of each name, as this PEFT reads the number."""
    given = config.layers_pattern or ()
    lists = (given,) if isinstance(given, str) else given
    if all(_is_plain(part) for part in lists):
        ranks = {part: rank for rank, part in reversed([*enumerate(lists)])}
        return [_index(name, ranks, peft=peft) for name in names]
    found = search([_index_pattern(part, peft=peft) for part in lists], names)
    # The first pattern that matches decides, even if the pattern finds no number.
    first = (
        next((hit for hit in hits if hit is not None), None) for hits in zip(*found, strict=True)
    )
    return [None if hit is None else _number(hit, peft=peft) for hit in first]


def _index(name: str, ranks: Mapping[str, int], *, peft: Version) -> int | None:
    """Find the layer's number without a regular expression: `<list module>.<number>.`.

    The first list module in the name decides; an empty list means any module.
    """
    parts = name.split(".")
    # Only PEFT 0.21, and only for a named pattern, takes a list module at the very beginning.
    first = 1 if ranks and peft >= (0, 21) else 2
    numbered = [at for at in range(first, len(parts) - 1) if parts[at].isdecimal()]
    if ranks:
        best = min((ranks[parts[at - 1]] for at in numbered if parts[at - 1] in ranks), default=-1)
        numbered = [at for at in numbered if ranks.get(parts[at - 1]) == best]
    if not numbered:
        return None
    return _number(parts[numbered[0 if peft >= (0, 20) else -1]], peft=peft)


def _index_pattern(part: str, *, peft: Version) -> Pattern:
    if peft >= (0, 21):
        return Pattern("layers_pattern", rf"(?:^|.*?\.){part}\.(?P<idx>\d+)\.", group="idx")
    start = ".*?" if peft >= (0, 20) else ".*"
    return Pattern("layers_pattern", rf"{start}\.{part}\.(\d+)\.", group=1)


def _number(text: str, *, peft: Version) -> int | None:
    if text.isdecimal():
        return int(text) if len(text) < 20 else None
    if peft >= (0, 21):
        return None
    raise CheckpointError(
        rules.TARGET_REGEX_INVALID.at(
            CONFIG_NAME,
            "layers_pattern has a group of its own, which PEFT before 0.21 takes for the index.",
        )
    )


def _is_plain(pattern: str) -> bool:
    """Say whether a pattern matches its own text alone, so that a comparison is enough."""
    return re.fullmatch(r"[\w-]+", pattern) is not None


# --- names as a tree ------------------------------------------------------------------------------


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
