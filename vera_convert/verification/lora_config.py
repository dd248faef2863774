"""Check that an engine loads every tensor of a LoRA by the LoRA's config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.base.facts import BaseFacts
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.lora.checks import peft_findings
from vera_convert.lora.engines import EngineName, Form
from vera_convert.lora.forms import layer_count
from vera_convert.lora.reading import ReadLora
from vera_convert.rules import Finding
from vera_convert.targets.matching import is_all_linear, matching
from vera_convert.text import printable

_LAYER = re.compile(r"(?:.+\.)?layers\.(\d{1,6})\.(.+)")


def unloaded_findings(
    lora: ReadLora, loaded: Mapping[str, str], task_type: str | None, base_facts: BaseFacts
) -> Iterator[Finding]:
    """Yield a finding for each tensor that the engine would leave out or refuse.

    Args:
        lora: the LoRA.
        loaded: the LoRA's name of each layer to load, by the adapter's module path.
        task_type: the field of the VeRA adapter's config.
        base_facts: the base facts.

    Raises:
        CheckpointError: a field of the config is malformed.
    """
    if lora.config is None:
        return
    names = [*loaded.values()]
    if lora.form is Form.MLX:
        yield from _mlx_findings(lora, names, base_facts)
        return
    yield from _target_findings(lora, names, lora.config)
    if lora.form is not Form.PEFT:
        return
    bias, task = lora.config.get("bias", "none"), lora.config.get("task_type")
    if bias not in ("none", "all", "lora_only"):
        yield rules.LORA_NOT_LOADED.in_file(CONFIG_NAME, f"bias is {printable(str(bias))}.")
    if task not in (None, task_type):
        reason = f"task_type is {printable(str(task))}, and the adapter's is {task_type}."
        yield rules.LORA_NOT_LOADED.in_file(CONFIG_NAME, reason)
    if lora.engine == EngineName.PEFT:
        yield from peft_findings([*loaded], base_facts)


def _target_findings(
    lora: ReadLora, names: Sequence[str], config: Mapping[str, object]
) -> Iterator[Finding]:
    """Yield the layers that the config leaves out, or gives another rank."""
    targeted = _matched(names, config, "target_modules")
    excluded = _matched(names, config, "exclude_modules") if config.get("exclude_modules") else ()
    for name in names:
        if name not in targeted or name in excluded:
            reason = "target_modules and its limits leave out this layer."
            yield rules.LORA_NOT_LOADED.at(printable(name), reason)
    if not config.get("rank_pattern"):
        yield from _rank_findings(lora, names, config.get("r", 8))


def _rank_findings(lora: ReadLora, names: Sequence[str], rank: object) -> Iterator[Finding]:
    for name in names:
        own = lora.layers[name].rank
        if own != rank:
            reason = f"its rank is {own}, and the config's is {printable(str(rank))}."
            yield rules.LORA_NOT_LOADED.at(printable(name), reason)


def _mlx_findings(lora: ReadLora, names: Sequence[str], base_facts: BaseFacts) -> Iterator[Finding]:
    """Yield the layers that MLX-LM makes no LoRA of.

    MLX-LM takes `keys` for paths in the model, and for paths in each of the last `num_layers`
    layers, where 0 stands for all layers.
    """
    config: Mapping[str, Any] = lora.config or {}
    number, keys = config.get("num_layers"), _texts(config["lora_parameters"], "keys")
    if not isinstance(number, int) or isinstance(number, bool):
        raise _malformed("num_layers")
    places = {name: _LAYER.fullmatch(name) for name in names}
    first = layer_count({*base_facts.modules, *names}) - number if number > 0 else 0
    for name, place in places.items():
        is_of_last = place and int(place[1]) >= first and (keys is None or place[2] in keys)
        if name not in (keys or ()) and not is_of_last:
            reason = "num_layers and keys leave out this layer."
            yield rules.LORA_NOT_LOADED.at(printable(name), reason)
    yield from _rank_findings(lora, names, config["lora_parameters"].get("rank"))


def _matched(names: Sequence[str], config: Mapping[str, object], field: str) -> frozenset[str]:
    """Return the modules that a field of names, or a regular expression, matches."""
    found = config.get(field)
    targets = found if isinstance(found, str) else _texts(config, field)
    if targets is None:
        return frozenset()  # PEFT's own choice for the base; PEFT saves no such config
    if is_all_linear(targets):
        return frozenset(names)  # depends on the model alone
    limits: dict[str, Any] = {}
    if field == "target_modules":
        limits["layers_to_transform"] = _numbers(config, "layers_to_transform")
        pattern = config.get("layers_pattern")
        named = isinstance(pattern, str)
        limits["layers_pattern"] = pattern if named else _texts(config, "layers_pattern")
    return frozenset(matching(names, VeraConfig(target_modules=targets, **limits)))


def _texts(config: Mapping[str, object], field: str) -> tuple[str, ...] | None:
    """Return a list of texts; None if the config has no such field."""
    found = config.get(field)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise _malformed(field)
    return tuple(found)


def _numbers(config: Mapping[str, object], field: str) -> tuple[int, ...] | None:
    """Return a list of numbers, or a number as a list; None if the config has no such field."""
    found = config.get(field)
    listed = found if found is None or isinstance(found, list) else [found]
    if listed is None:
        return None
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
        raise _malformed(field)
    return tuple(listed)


def _malformed(field: str) -> CheckpointError:
    return CheckpointError(rules.LORA_UNREADABLE.in_file(CONFIG_NAME, f"{field} is malformed."))
