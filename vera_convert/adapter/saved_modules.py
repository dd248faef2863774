"""Tensors in place of the base's tensors: modules saved whole, biases, resized embeddings."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from vera_convert import rules
from vera_convert.adapter.adapter import AdaptedLayer
from vera_convert.adapter.config import SAVED_BY_TASK, VeraConfig, peft_release
from vera_convert.adapter.names import PREFIX
from vera_convert.embeddings import may_be_resized
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding
from vera_convert.tables import table
from vera_convert.text import printable

_BASE_BIAS = ".base_layer.bias"
_KNOWN_HEADS = frozenset(name for names in SAVED_BY_TASK.values() for name in names)
_TOKEN_ROWS = re.compile(r"(?:^|\.)(?:token_adapter(?:\.|$)|trainable_tokens_)")
"""A part of the names of rows of an embedding, as PEFT's trainable tokens have it."""
_NO_HEAD = re.compile(
    r"(?:.*[._])?(?:(?:layer_?)?norm\w*|ln_\w+|pooler|\d+\..*)(?:\..*)?", re.IGNORECASE
)
"""Paths of saved modules that are no head: norms, poolers, and modules in numbered layers."""

_WITHOUT_PARAMETERS = re.compile(
    r"(?:^|[._])(?:act|activation|act_fn|dropout|drop|pool|pooling|identity|rotary_emb)\d*$",
    re.IGNORECASE,
)
"""The ends of names of modules without parameters. Nearly every norm has some."""


def replaced_name(name: str) -> str:
    """Return the name of a replacement in the base: no prefix, no ``base_layer``."""
    module, _, parameter = name.removeprefix(PREFIX).rpartition(".")
    return f"{module.removesuffix('.base_layer')}.{parameter}" if module else parameter


class SavedModules:
    """The modules that PEFT saves whole: the config names some, and the config's task adds others.

    The cost of a search does not grow with the number of names.

    PEFT compares each name with the end of a module's path, even inside an element of the path.
    """

    def __init__(self, config: VeraConfig) -> None:
        self._names = frozenset(filter(None, config.saved_modules))
        self._lengths = sorted({len(name) for name in self._names})

    def __bool__(self) -> bool:
        return bool(self._names)

    def of(self, module: str) -> frozenset[str]:
        """Return the names by which a module, or a module around the module, is saved."""
        return frozenset().union(*self.around(module).values())

    def around(self, module: str) -> dict[str, frozenset[str]]:
        """Return the names of each saved module, by path: the module, and the modules around it."""
        found = {}
        for end in (found.start() for found in re.finditer(r"\.|\Z", module)):
            lengths = self._lengths[: bisect_right(self._lengths, end)]
            names = self._names.intersection(module[end - length : end] for length in lengths)
            if names:
                found[module[:end]] = names
        return found


def replacement_findings(
    others: Sequence[TensorData],
    layers: Mapping[str, AdaptedLayer],
    config: VeraConfig,
    *,
    renamed: bool,
) -> Iterator[Finding]:
    """Yield the findings for the tensors in place of the base's tensors.

    Args:
        others: the tensors in place of the base's tensors.
        layers: the adapted layers.
        config: the adapter's config.
        renamed: whether tensors have names that PEFT does not write, so that some can be missing.
    """
    declared = SavedModules(config)
    saved: dict[str, frozenset[str]] = {}
    nested: dict[str, str] = {}
    bias_stored = False
    for tensor in others:
        module, _, parameter = replaced_name(tensor.name).rpartition(".")
        around = declared.around(module)
        names = frozenset().union(*around.values())
        nested |= dict(pairwise([*reversed(around)]))
        if _TOKEN_ROWS.search(tensor.name):
            rows = f"{tensor.shape[0]:,} rows" if tensor.shape else "a value"
            reason = f"it holds {rows} of an embedding, trained with trainable_token_indices."
            yield rules.TOKEN_ROWS.in_tensor(tensor.name, reason)
        elif names:
            saved[module] = names
        else:
            bias_stored |= parameter == "bias"
            yield from _undeclared(tensor, layers, config)
    if nested:
        inner, outer = min(nested.items())
        more = f", and {len(nested) - 1:,} more such modules" if len(nested) > 1 else ""
        yield rules.NESTED_MODULES.at(printable(inner), f"it lies in {printable(outer)}{more}.")
    if not renamed:
        yield from _incomplete_modules(saved, layers, config)
        if config.bias != "none" and not bias_stored:
            rule = rules.BIAS_NOT_STORED
            stores_biases = (peft_release(config.peft_version) or (0, 0)) >= (0, 21)
            rule = rule.as_note() if stores_biases else rule
            reason = f'bias is "{printable(config.bias)}", and the file holds no bias.'
            yield rule.in_file(WEIGHTS_NAME, reason)


def _undeclared(
    tensor: TensorData, layers: Mapping[str, AdaptedLayer], config: VeraConfig
) -> Iterator[Finding]:
    """Yield a finding if nothing explains a tensor outside modules_to_save."""
    name = replaced_name(tensor.name)
    module, _, parameter = name.rpartition(".")
    is_adapted = module in layers
    if parameter == "bias" and is_adapted and not tensor.name.endswith(_BASE_BIAS):
        reason = f"PEFT looks for {printable(PREFIX + module)}{_BASE_BIAS}, not this name."
        yield rules.UNKNOWN_TENSOR.in_tensor(tensor.name, reason)
        return
    trains_bias = config.bias == "all" or (config.bias != "none" and is_adapted)
    is_explained = parameter == "bias" and trains_bias
    is_explained |= parameter in ("weight", "bias") and may_be_resized(module)
    if not is_explained:
        reason = f"it replaces {printable(name)} of the base model."
        yield rules.UNDECLARED_TENSOR.in_tensor(tensor.name, reason)


def _incomplete_modules(
    saved: Mapping[str, Collection[str]], layers: Collection[str], config: VeraConfig
) -> Iterator[Finding]:
    """Yield a finding for each declared module without a tensor in the file.

    The finding is a warning if the model can lack the module, or if the name is that of a module
    without parameters, such as an activation. PEFT requires one of the modules in modules_to_save,
    and the head of a task only if the head's name is known to PEFT.

    Args:
        saved: the declared names of each stored module, by the module's path.
        layers: paths of the adapted layers.
        config: the adapter's config.
    """
    declared = frozenset(config.saved_modules)
    stored = frozenset().union(*saved.values())
    reason = "the file stores no tensor of this module."
    for name in sorted(declared - _KNOWN_HEADS - stored):
        rule, doubt = rules.MODULE_TO_SAVE_MISSING, ""
        if stored or _WITHOUT_PARAMETERS.search(name):
            rule = rule.as_warning()
            doubt = " This is right only for a module without parameters, or if no module matches."
        yield rule.at(printable(name), reason + doubt)
    heads = declared & _KNOWN_HEADS  # a model has at most a single head
    if heads and heads.isdisjoint(stored) and not _has_other_head(saved, layers, config.task_type):
        rule = rules.MODULE_TO_SAVE_MISSING
        if _has_unknown_head("perhaps_unknown", config.task_type, layers):
            rule = rule.as_warning()
            reason += " This is right only if the model's head has another name."
        yield rule.at(printable(" or ".join(sorted(heads))), reason)


def _has_other_head(saved: Iterable[str], layers: Iterable[str], task: str | None) -> bool:
    """Say whether the model's head is stored under another name, or is unknown to PEFT."""
    return any(
        not _NO_HEAD.fullmatch(module) and not may_be_resized(module) for module in saved
    ) or _has_unknown_head("unknown", task, layers)


def _has_unknown_head(section: str, task: str | None, layers: Iterable[str]) -> bool:
    """Say whether a layer has a path that a section of ``unknown_heads.toml`` names for a task."""
    pattern = table(__file__, "unknown_heads.toml")[section].get(task or "")
    return pattern is not None and any(re.search(pattern, layer, re.VERBOSE) for layer in layers)
