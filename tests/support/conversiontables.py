"""The renames of transformers' conversion tables, read from the classes of the installed release.

Run as a script, it prints `vera_convert/base/conversions.txt`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import conversion_mapping
from transformers import core_model_loading as loading
from transformers.models.auto import modeling_auto

from vera_convert.adapter.names import PREFIX
from vera_convert.base import renames
from vera_convert.base.match import match_modules
from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.base.replacements import match_replacements
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import Location

_WITH_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
}
_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "conditional_detr": _WITH_RESNET,
    "deformable_detr": _WITH_RESNET,
    "detr": _WITH_RESNET,
    "aya_vision": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 8,
            "num_attention_heads": 2,
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}
    },
    "dots1": {"n_routed_experts": 2},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "esm": {"vocab_size": 33},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "videomae": {"image_size": 32},  # the table of positions is computed even without weights
}
"""Arguments without which a config of a type describes no model that can be built."""
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def registry() -> Mapping[str, list[Any]]:
    """Return all conversion tables, by model type or class name."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    tables: Mapping[str, list[Any]] = conversion_mapping._checkpoint_conversion_mapping_cache
    return tables


def candidates() -> Iterator[Any]:
    """Yield the classes that a conversion table concerns, and the classes around them."""
    tables = registry()
    names = {name for name in tables if hasattr(transformers, name)}
    for mapping in vars(modeling_auto):
        if mapping.startswith("MODEL") and mapping.endswith("_MAPPING_NAMES"):
            for each in getattr(modeling_auto, mapping).values():
                names |= {each} if isinstance(each, str) else set(each)
    for name in sorted(filter(None, names)):
        found = getattr(transformers, name, None)
        try:
            config = getattr(found, "config_class", None)
        except ImportError:  # the class needs a library that is not installed
            continue
        if config is not None and (name in tables or set(_types(config)) & tables.keys()):
            yield found


def _types(config: Any, seen: tuple[Any, ...] = ()) -> Iterator[str]:
    yield getattr(config, "model_type", "")
    for part in getattr(config, "sub_configs", {}).values():
        if part not in seen and part is not config:
            yield from _types(part, (*seen, config))


@contextmanager
def without_initial_values() -> Iterator[None]:
    """Let layers draw no initial values, which take half of the time even on the meta device."""
    layers = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(patch.object(layer, "reset_parameters", lambda _self: None))
        yield


def build(model_class: Any) -> Any:
    """Build a model without memory for its weights; None if its config describes none."""
    config = model_class.config_class
    given = _ARGUMENTS.get(getattr(config, "model_type", ""), {})
    for arguments in ({"num_hidden_layers": 2, **given}, given):
        try:
            with torch.device("meta"), without_initial_values(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return model_class(config(**arguments))
        except Exception:  # noqa: BLE001, S112 -- a class can refuse its own defaults in any way
            continue
    return None


@dataclass
class Walk:
    """The results of building every class with a conversion table.

    Attributes:
        met: the classes and model types that were built, alone or as a part.
        renames: template in memory by template in the files, of classes whose layers are found in
            no other way; by model type, and by whether the class has no head.
        wrong: why the layers of a class are not found in its files, by the class's name.
        lost: the other tensors of a class that are not found in its files: name in the files by
            name in memory, by the class's name.
    """

    met: set[str] = field(default_factory=set)
    renames: dict[tuple[str, bool], list[dict[str, str]]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)


def in_files(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the name in the files of each tensor that is only renamed, by its name in memory."""
    steps = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    steps = [step for step in steps if not isinstance(step, loading.PrefixChange)]
    back = [step.reverse_transform() for step in reversed(steps)]
    plain = [step for step in back if isinstance(step, loading.WeightRenaming)]
    others = [step for step in back if isinstance(step, loading.WeightConverter)]
    found = {}
    for name in sorted(names, key=loading.dot_natural_key):
        _, converted = loading.apply_converters(name, others)
        if converted is None:
            found[name] = loading.apply_renamings(name, plain)
    return found


def linear_in_files(model: Any) -> dict[str, str]:
    """Return the path in the files of each linear layer that is only renamed, by its path."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = in_files(model, [f"{name}.weight" for name in linear])
    return {
        name.removesuffix(".weight"): path.removesuffix(".weight")
        for name, path in found.items()
        if path.endswith(".weight")
    }


def others_in_files(model: Any, layers: Collection[str]) -> dict[str, str]:
    """Return the name in the files of each other tensor, by its name in memory.

    The tensors of a template have names alike, so a few of each are enough.
    """
    some: dict[str, list[str]] = {}
    for name in model.state_dict():
        if name.removesuffix(".weight") not in layers:
            some.setdefault(NUMBER.sub("#", name), []).append(name)
    return in_files(model, {name for each in some.values() for name in (*each[:2], each[-1])})


def walk() -> Walk:
    """Build every class that a table concerns, and compare our renames with transformers'."""
    result = Walk()
    for model_class in candidates():
        model = build(model_class)
        if model is not None:
            for part in model.modules():
                if isinstance(part, transformers.PreTrainedModel):
                    result.met |= {type(part).__name__, part.config.model_type}
            _compare(model, result)
    return result


def _compare(model: Any, result: Walk) -> None:
    name, config = type(model).__name__, model.config.to_dict()
    clear = _clear(linear_in_files(model))
    layers = {module: path for module, (path, _, _) in clear.items()}
    others = others_in_files(model, layers)
    with patch.object(renames, "conversions", dict):
        found = not mismatch(layers, config)
    table = {} if found else {files: memory for _, files, memory in clear.values()}
    tables = result.renames.setdefault((model.config.model_type, name.endswith("Model")), [])
    with patch.object(renames, "conversions", lambda: {model.config.model_type: [table]}):
        lost = not_found(others, layers, config)
    more = {files: memory for _, files, memory in _clear(_paths(lost)).values()}
    table = {files: memory for files, memory in (table | more).items() if files != memory}
    if table:
        _add(table, tables)
    reason = "" if found else mismatch(layers, config)
    if reason:
        result.wrong[name] = reason
    lost = not_found(lost, layers, config)
    if lost:
        result.lost[name] = lost


def _paths(tensors: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of the modules for tensors whose last part stays, and names for the rest."""
    pairs = {(_module(memory), _module(files)) for memory, files in tensors.items()}
    in_memory, on_disk = (Counter(side) for side in zip(*pairs, strict=True)) if pairs else ({}, {})
    found: dict[str, str] = {}
    for memory, files in tensors.items():
        module, path = _module(memory), _module(files)
        is_alone = bool(module and path) and in_memory[module] == on_disk[path] == 1
        keeps_last = memory.removeprefix(module) == files.removeprefix(path)
        found |= {module: path} if is_alone and keeps_last else {memory: files}
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _add(table: dict[str, str], tables: list[dict[str, str]]) -> None:
    """Join a table with the first table that contradicts no entry, in either direction."""
    for other in tables:
        both = {*table.items(), *other.items()}
        if len(both) == len(table | other) == len({memory for _, memory in both}):
            other.update(table)
            return
    tables.append(table)


def _clear(layers: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
    """Return path in the files and both templates of each layer, as far as templates tell layers.

    A number of a path that the other path has not is a name, and no number of a layer. A table of
    templates can have such a name in memory, and none in the files.
    """
    found = {}
    for memory, files in layers.items():
        numbers, others = NUMBER.findall(files), NUMBER.findall(memory)
        if others[: len(numbers)] == numbers:
            parts = NUMBER.split(memory)
            named = ["#"] * len(numbers) + others[len(numbers) :] + [""]
            joined = "".join(part + name for part, name in zip(parts, named, strict=True))
            found[memory] = files, NUMBER.sub("#", files), joined
    several: dict[str, set[str]] = {}
    for memory, files in layers.items():
        _, _, template = found.get(memory, ("", "", memory))
        several.setdefault(NUMBER.sub("#", files), set()).add(template)
    return {memory: each for memory, each in found.items() if len(several[each[1]]) == 1}


def not_found(
    others: Mapping[str, str], layers: Mapping[str, str], config: Mapping[str, object]
) -> dict[str, str]:
    """Return the tensors beside the layers that an adapter's merge would not find in the files."""
    base = _base(layers, config, others.values())
    try:
        match = match_modules(dict.fromkeys(layers, 8), base)
    except CheckpointError:
        return {}
    keys = {f"{PREFIX}{name}": path for name, path in others.items()}
    try:
        found = match_replacements(dict.fromkeys(keys, (8,)), match, base)
    except CheckpointError as error:
        return {"": str(error)}
    lost = {key: path for key, path in keys.items() if found[key][0].target != path}
    return {key.removeprefix(PREFIX): path for key, path in lost.items()}


def _base(
    layers: Mapping[str, str], config: Mapping[str, object], others: Iterable[str] = ()
) -> BaseModel:
    shapes = {
        **dict.fromkeys(others, (8,)),
        **{f"{path}.weight": (8, 8) for path in layers.values()},
    }
    tensors = {
        name: BaseTensor("m", TensorInfo(name, "F32", shape, 0, 0))
        for name, shape in shapes.items()
    }
    return BaseModel(Location("base", None), config, {}, tensors)


def mismatch(layers: Mapping[str, str], config: Mapping[str, object]) -> str:
    """Return why a layer of a model is not found in the files; an empty text if all are found."""
    try:
        match = match_modules(dict.fromkeys(layers, 8), _base(layers, config))
    except CheckpointError as error:
        return str(error)
    for module, path in layers.items():
        if match.tensors[module] != f"{path}.weight":
            return f"{module} is {path}, not {match.tensors[module]}"
        if match.strategy.undo(path) != module:
            return f"{path} becomes {match.strategy.undo(path)}, not {module}"
    return ""


def file_text(walked: Walk) -> str:
    """Return the text of the generated file."""
    blocks = []
    for (kind, _), tables in sorted(walked.renames.items()):
        for table in tables:
            lines = [f"    {files} {memory}" for files, memory in sorted(table.items())]
            blocks += [kind, *lines] if lines else []
    text = "\n".join(blocks)
    release = transformers.__version__
    return f"""# Renames of whole models that renames.toml does not state, one table for each class.
# Generated by tests/support/conversiontables.py from transformers {release}; do not edit.
# A line without an indent is a model type. The lines below hold the path of a module in the files
# and the path in memory, with # for the number of a layer; or the names of a tensor, if the last
# part of the name differs too.
{text}
"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.stdout.write(file_text(walk()))
