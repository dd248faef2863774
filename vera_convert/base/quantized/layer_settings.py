"""The settings of each quantized layer, where a config has settings for some layers alone.

compressed-tensors has groups with targets. gptqmodel has rules with expressions, ``dynamic``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from vera_convert.base.model import BaseModel
from vera_convert.base.renames import other_names
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.targets.patterns import Pattern, search

Settings = Mapping[str, object]
_CLASS = re.compile(r"[A-Z]\w*")
"""The name of a class of layers, such as Linear."""
_OF_RULES = ("bits", "group_size", "desc_act", "sym", "pack_dtype")
"""The settings of a packed layer that a rule replaces."""


def settings_by_layer(
    base: BaseModel, settings: Settings, paths: Sequence[str]
) -> Mapping[str, Settings]:
    """Return the quantization settings of each layer.

    ``config_groups`` holds only the groups that can mean the layer. ``dynamic`` is left out, and
    the layer's rule has replaced settings. If the rule leaves the layer plain, or if the rules
    cannot be evaluated, ``dynamic`` stays.

    Args:
        base: the base.
        settings: the quantization settings of the config.
        paths: the paths of the layers in the base's files.
    """
    groups, rules = settings.get("config_groups"), settings.get("dynamic")
    if isinstance(groups, Mapping) and groups:
        return _by_groups(base, settings, groups, paths)
    if isinstance(rules, Mapping) and rules:
        return _by_rules(base, settings, rules, paths)
    return dict.fromkeys(paths, settings)


def _by_groups(
    base: BaseModel, settings: Settings, groups: Settings, paths: Sequence[str]
) -> Mapping[str, Settings]:
    """Return the settings of each layer with the groups that can mean the layer.

    A target is a path, an expression ``re:...``, or a class of layers. compressed-tensors takes a
    path before an expression, and both before a class; of two groups with the same target, the
    last. A file tells no class: all groups of classes can mean a layer without another target. If
    an expression cannot be evaluated, all groups can mean all layers.
    """
    of_target = {text: key for key, group in groups.items() for text in targets_of(group)}
    of_classes = frozenset(key for text, key in of_target.items() if is_class(text))
    named = sorted(text for text in of_target if not is_class(text))
    names = other_names(base, paths) if named else {path: [path] for path in paths}
    expressions = {text: text.removeprefix("re:") for text in named if text.startswith("re:")}
    fitting = _first_fitting(expressions, names)
    if fitting is None:
        return dict.fromkeys(paths, settings)
    chosen: dict[str, frozenset[str]] = {}
    for path in paths:
        best = min(of_target.keys() & names[path], default=fitting.get(path))
        chosen[path] = frozenset((of_target[best],)) if best else of_classes or frozenset(groups)
    order = {key: number for number, key in enumerate(groups)}
    shared = {
        keys: {
            **settings,
            "config_groups": {key: groups[key] for key in sorted(keys, key=order.__getitem__)},
        }
        for keys in {*chosen.values()}
    }
    return {path: shared[keys] for path, keys in chosen.items()}


def _by_rules(
    base: BaseModel, settings: Settings, rules: Settings, paths: Sequence[str]
) -> Mapping[str, Settings]:
    """Return the settings of each layer after the first rule whose expression fits the layer."""
    expressions = {rule: rule.removeprefix("+:").removeprefix("-:") for rule in rules}
    fitting = _first_fitting(expressions, other_names(base, paths))
    if fitting is None:
        return dict.fromkeys(paths, settings)
    without = {key: value for key, value in settings.items() if key != "dynamic"}
    shared: dict[str | None, Settings] = {None: without}
    for rule in {*fitting.values()}:
        values = rules[rule]
        if isinstance(values, Mapping) and not rule.startswith("-:"):
            shared[rule] = without | {key: values[key] for key in _OF_RULES if key in values}
        else:
            shared[rule] = {**settings, "dynamic": {rule: values}}
    return {path: shared[fitting.get(path)] for path in paths}


def _first_fitting(
    expressions: Mapping[str, str], names: Mapping[str, Sequence[str]]
) -> Mapping[str, str] | None:
    """Return the key of the first expression that fits each layer; None if any cannot be evaluated.

    Args:
        expressions: the expressions by key, in order.
        names: the names of each layer in the files and in memory, by path.
    """
    every = [*dict.fromkeys(name for others in names.values() for name in others)]
    hits = fitting_expressions(expressions, every)
    if hits is None:
        return None
    order = {key: number for number, key in enumerate(expressions)}
    fitting = {path: {key for name in names[path] for key in hits[name]} for path in names}
    return {path: min(keys, key=order.__getitem__) for path, keys in fitting.items() if keys}


def fitting_expressions(
    expressions: Mapping[str, str], names: Sequence[str]
) -> dict[str, set[str]] | None:
    """Return the keys of the expressions that fit each name; None if any is invalid or slow.

    A single process compares all names, because the start of a process takes a tenth of a second.
    """
    patterns = [Pattern("quantization_config", text) for text in expressions.values()]
    try:
        results = search(patterns, names)
    except (CheckpointError, SurroundingsError):
        return None
    found: dict[str, set[str]] = {name: set() for name in names}
    for key, hits in zip(expressions, results, strict=True):
        for name, hit in zip(names, hits, strict=True):
            if hit is not None:
                found[name].add(key)
    return found


def targets_of(group: object) -> Iterator[str]:
    """Yield the targets of a group of layers."""
    yield from texts(group.get("targets") if isinstance(group, Mapping) else None)


def is_class(target: str) -> bool:
    """Say whether a target is a class of layers, such as Linear."""
    return _CLASS.fullmatch(target) is not None


def texts(value: object) -> Iterator[str]:
    """Yield the texts in a value: a text, or a list of texts or of lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)
