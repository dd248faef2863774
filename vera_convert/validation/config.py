"""Check a well-formed config: fields that some releases or users cannot use, and the targets.

The targets are compared with the adapted layers of the file, without a base. The config matched
these layers when the adapter was trained, so each layer must match again, in every release of PEFT
that loads the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.arguments import NEWEST_PEFT
from vera_convert.embeddings import may_be_resized
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.hub.repo_name import is_repo_id, is_revision
from vera_convert.rules import Finding
from vera_convert.targets.matching import Endings, is_all_linear, matching
from vera_convert.text import printable

_COPY_IS_FINE = "No action is needed: PEFT stores the base's weight of an adapted head."

RELEASES = {"0.15 and earlier": (0, 15), "0.16 to 0.19": (0, 19), "0.20": (0, 20)}
"""The releases whose rules differ from the newest rules, by name."""
_NUMBERED = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.(?P<target>.+)")

TARGET_FIELDS = frozenset(
    ("target_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type")
)
"""The fields for the selection of layers."""


def config_findings(config: VeraConfig, unsound: Collection[str]) -> Iterator[Finding]:
    """Yield findings for the base's name, and for fields rejected by some releases.

    Args:
        config: the config.
        unsound: the names of fields already reported as wrong.
    """
    name = config.base_model_name_or_path
    if {"base_model_name_or_path", "revision"} & {*unsound}:
        pass
    elif not name:
        yield rules.BASE_UNNAMED.in_file(CONFIG_NAME, "base_model_name_or_path is empty.")
    elif not is_repo_id(name):
        reason = f"base_model_name_or_path is {printable(name)}, which is not a repo on the Hub."
        yield rules.BASE_IS_PATH.in_file(CONFIG_NAME, reason)
    elif config.revision is not None and not is_revision(config.revision):
        reason = f"revision is {printable(config.revision)}, which is not a valid revision in git."
        yield rules.REVISION_INVALID.in_file(CONFIG_NAME, reason)
    elif config.revision is None:
        yield rules.REVISION_MISSING.in_file(CONFIG_NAME, f"revision is null; the base is {name}.")
    for reason in _fields_by_version(config):
        yield rules.FIELD_BY_VERSION.in_file(CONFIG_NAME, reason)


def _fields_by_version(config: VeraConfig) -> Iterator[str]:
    if isinstance(config.layers_pattern, tuple) and config.layers_pattern:
        yield "layers_pattern is a list; PEFT 0.13 and earlier accept only a text."
    if config.layers_pattern and config.layers_to_transform in (0, ()):
        yield (
            "layers_to_transform is 0 or empty, with a layers_pattern; PEFT 0.14 to 0.20 read this "
            "as missing and refuse the adapter."
        )
    if config.bias not in ("none", "all", "vera_only"):
        yield (
            f"bias is {printable(config.bias)}; PEFT before 0.18 accepts only none, all and "
            "vera_only."
        )


def undeclared_embeddings(
    config: VeraConfig, replacements: Iterable[TensorData]
) -> Iterator[Finding]:
    """Yield a note for each saved embedding or head missing in the config.

    Args:
        config: the config.
        replacements: the tensors in place of the base's tensors.
    """
    saved = SavedModules(config)
    for tensor in replacements:
        module, _, parameter = replaced_name(tensor.name).rpartition(".")
        if parameter == "weight" and may_be_resized(module) and not saved.of(module):
            reason = f"it replaces {printable(replaced_name(tensor.name))} of the base model."
            found = rules.EMBEDDING_UNDECLARED.in_tensor(tensor.name, reason)
            is_copy = ".base_layer." in tensor.name
            yield found.with_remedy(_COPY_IS_FINE) if is_copy else found


# --- the targets ---------------------------------------------------------------------------------


def target_findings(config: VeraConfig, layers: Sequence[str], *, alone: bool) -> Iterator[Finding]:
    """Yield how targets and adapted layers disagree, and how releases of PEFT disagree.

    Args:
        config: the config; its targets may be names or a regular expression.
        layers: paths of the adapted layers.
        alone: whether no base is known; a base shows better which layers the targets match.
    """
    targets = config.target_modules
    if not layers or targets is None or is_all_linear(targets):
        return
    try:
        newest = matching(layers, config, peft=NEWEST_PEFT)
    except CheckpointError as error:
        yield from error.findings
        return
    matched = {*newest}
    unmatched = [layer for layer in layers if layer not in matched]
    if not matched:
        reason = (
            f"the config's targets match none of the {len(layers)} layers that the file adapts, "
            f"such as {printable(layers[0])}."
        )
        yield rules.TARGETS_MATCH_NOTHING.in_file(CONFIG_NAME, reason)
    elif alone and unmatched:
        reason = (
            f"the targets match {len(newest)} of the {len(layers)} adapted layers; PEFT leaves out "
            f"layers such as {printable(unmatched[0])}."
        )
        yield rules.TARGETS_DISAGREE.in_file(CONFIG_NAME, reason)
    if not isinstance(targets, str):
        yield from _targets_by_version(config, layers, newest)
        yield from _not_stored(config, targets, layers) if alone else ()


def _targets_by_version(
    config: VeraConfig, layers: Sequence[str], newest: Sequence[str]
) -> Iterator[Finding]:
    """Yield a finding if another release adapts other layers of the file.

    Releases differ only in how they read a layer's number; modules_to_save does not matter.
    """
    if config.layers_to_transform is None:
        return
    alone = replace(config, modules_to_save=None, task_type=None)
    differing = {}
    for release, version in RELEASES.items():
        try:
            found = matching(layers, alone, peft=version)
        except CheckpointError:
            continue  # reported with the newest rules
        if len(found) < len(layers) and {*found} != {*newest}:
            differing[release] = len(found)
    if differing:
        said = ", ".join(f"PEFT {release} adapts {count}" for release, count in differing.items())
        reason = f"of {len(layers)} layers, {said}; PEFT 0.21 and later adapt {len(newest)}."
        yield rules.TARGETS_BY_VERSION.in_file(CONFIG_NAME, reason)


def _not_stored(
    config: VeraConfig, targets: Sequence[str], layers: Sequence[str]
) -> Iterator[Finding]:
    saved = SavedModules(config)
    endings = Endings(targets)
    stored = {target for layer in layers for target in endings.of(layer)}
    for target in dict.fromkeys(targets):
        if target not in stored and not saved.of(target):
            reason = f"target_modules names {printable(target)}, but the file lacks such a layer."
            yield rules.TARGET_NOT_STORED.in_file(WEIGHTS_NAME, reason)


def uneven_findings(config: VeraConfig, layers: Iterable[str]) -> Iterator[Finding]:
    """Yield a note for each target that is adapted in fewer layers of a stack than another target.

    Only a base shows whether all layers of the stack have the target.

    Args:
        config: the config; layers that the config lists by full name are left out.
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
            yield rules.LAYERS_UNEVEN.at(printable(name), reason)
