"""The config's targets held against the layers that the file adapts, without a base.

The names of the file are those that the config was matched against when the adapter was trained,
so that each of them has to match again, in whatever release loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from vera_convert.adapter.config import CONFIG_NAME, SAVED_BY_TASK, VeraConfig
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.errors import CheckpointError
from vera_convert.rules import (
    LAYERS_UNEVEN,
    TARGET_NOT_STORED,
    TARGETS_BY_VERSION,
    TARGETS_DISAGREE,
    TARGETS_MATCH_NOTHING,
    Finding,
)
from vera_convert.targets.endings import Endings
from vera_convert.targets.matching import NEWEST, is_all_linear, matching
from vera_convert.text import printable

RELEASES = {"0.15 and earlier": (0, 15), "0.16 to 0.19": (0, 19), "0.20": (0, 20)}
"""The releases whose rules differ from the newest, by how they are called."""
_NUMBERED = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.(?P<target>.+)")


TARGET_FIELDS = frozenset(
    ("target_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type")
)
"""The fields that decide which layers are meant."""


def target_findings(config: VeraConfig, layers: Sequence[str], *, alone: bool) -> Iterator[Finding]:
    """Yield how targets and adapted layers disagree, and how releases of PEFT read the targets.

    Args:
        config: the config; its targets may be names or a regular expression.
        layers: paths of the adapted layers.
        alone: whether there is no base, which tells better what the targets match.
    """
    targets = config.target_modules
    if not layers or targets is None or is_all_linear(targets):
        return
    try:
        newest = matching(layers, config, peft=NEWEST)
    except CheckpointError as error:
        yield from error.findings
        return
    matched = {*newest}
    unmatched = [layer for layer in layers if layer not in matched]
    if alone and not matched:
        reason = f"of the {len(layers)} layers that the file adapts, such as "
        yield TARGETS_MATCH_NOTHING.in_file(CONFIG_NAME, f"{reason}{printable(layers[0])}, none.")
    elif alone and unmatched:
        reason = (
            f"its targets match {len(newest)} of the {len(layers)} layers that the file adapts; "
            f"PEFT leaves out {printable(unmatched[0])}."
        )
        yield TARGETS_DISAGREE.in_file(CONFIG_NAME, reason)
    if not isinstance(targets, str):
        yield from _by_version(config, layers, newest)
        yield from _not_stored(config, targets, layers) if alone else ()


def _by_version(
    config: VeraConfig, layers: Sequence[str], newest: Sequence[str]
) -> Iterator[Finding]:
    """Yield a finding where another release adapts other layers of the file.

    They differ in how they read a layer's number alone; modules_to_save has no part in it.
    """
    if config.layers_to_transform is None:
        return
    alone = replace(config, modules_to_save=None, task_type=None)
    differing = {}
    for release, version in RELEASES.items():
        try:
            found = matching(layers, alone, peft=version)
        except CheckpointError:
            continue  # told with the newest
        if len(found) < len(layers) and {*found} != {*newest}:
            differing[release] = len(found)
    if differing:
        said = ", ".join(f"PEFT {release} adapts {count}" for release, count in differing.items())
        reason = f"of {len(layers)} layers, {said}; PEFT 0.21 and later adapt {len(newest)}."
        yield TARGETS_BY_VERSION.in_file(CONFIG_NAME, reason)


def _not_stored(
    config: VeraConfig, targets: Sequence[str], layers: Sequence[str]
) -> Iterator[Finding]:
    saved = {*(config.modules_to_save or ()), *SAVED_BY_TASK.get(config.task_type or "", ())}
    endings = Endings(targets)
    stored = {target for layer in layers for target in endings.of(layer)}
    for target in dict.fromkeys(targets):
        if target not in stored and not saved & {*target.split(".")}:
            reason = f"target_modules names {printable(target)}, no layer of the file is called so."
            yield TARGET_NOT_STORED.in_file(WEIGHTS_NAME, reason)


def uneven_findings(config: VeraConfig, layers: Iterable[str]) -> Iterator[Finding]:
    """Yield a note for each target that is adapted in fewer layers of a stack than another.

    Only a base tells whether all of the stack's layers have the target.

    Args:
        config: the config; layers that it lists by full name are left out.
        layers: paths of the adapted layers.
    """
    listed = {*(config.target_modules or ())}
    stacks: dict[str, dict[str, set[str]]] = {}
    for module in layers:
        parts = _NUMBERED.fullmatch(module)
        if parts is not None and module not in listed:
            targets = stacks.setdefault(parts["stack"], {})
            targets.setdefault(parts["target"], set()).add(parts["number"])
    for name, targets in stacks.items():
        every = frozenset[str]().union(*targets.values())
        lacking = {target: len(found) for target, found in targets.items() if found != every}
        for target, count in lacking.items():
            reason = f"{printable(target)} is adapted in {count} of {len(every)} layers."
            yield LAYERS_UNEVEN.at(printable(name), reason)
