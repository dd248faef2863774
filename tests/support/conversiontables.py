"""The renames of transformers' conversion tables, read from the classes of the installed release.

Run as a script, this module prints `vera_convert/base/conversions.txt`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any
from unittest.mock import patch

import peft
import torch
import transformers
from peft.utils import transformers_weight_conversion as peft_conversion
from transformers import conversion_mapping
from transformers import core_model_loading as loading
from transformers.models.auto import modeling_auto

from vera_convert.adapter.names import PREFIX
from vera_convert.base import renames
from vera_convert.base.match import match_modules
from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.base.rename_table import conversions
from vera_convert.base.replacements import match_replacements
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import Location

_WITH_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
}
_VIT, _BERT = {"model_type": "vit"}, {"model_type": "bert"}
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
    # With two layers, these models would lack some kinds of layers.
    "bailing_hybrid": {"num_hidden_layers": 6},
    "deepseek_v4": {"num_hidden_layers": 4},
    "inkling2_loop_text": {"num_hidden_layers": 24},
    "inkling2_text": {"num_hidden_layers": 48},
    "lfm3": {"num_hidden_layers": 3},
    "lfm3_vl_vision": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "vision-encoder-decoder": {"encoder": _VIT, "decoder": _BERT},
    "vision-text-dual-encoder": {"vision_config": _VIT, "text_config": _BERT},
    # transformers computes the table of positions even on the meta device
    "videomae": {"image_size": 32},
}
"""Arguments that a config of each type needs before a model can be built from the config."""
_PUBLISHED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (
        ("language_model.model.blocks.", "language_model.model.layers."),
        ("vision_tower.encoder.patch_embed", "vision_tower.patch_embed"),
    ),
    "qianfan_ocr": (("language_model.model.encoder.layers.", "language_model.model.layers."),),
}
"""Parts of names that differ between transformers and the published files. The step that
renames one tower is also inverted in the other tower; transformers loads both names."""
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def registry() -> Mapping[str, list[Any]]:
    """Return all conversion tables by model type or class name."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    tables: Mapping[str, list[Any]] = conversion_mapping._checkpoint_conversion_mapping_cache
    return tables


def candidates() -> Iterator[Any]:
    """Yield the classes that have a conversion table, and the classes that contain such a class."""
    tables = registry()
    names = {name for name in tables if hasattr(transformers, name)}
    names |= {name for name in dir(transformers) if name.endswith("Model")}
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
        if config is not None and (name in tables or _is_concerned(config, tables)):
            yield found


def _is_concerned(config: Any, tables: Mapping[str, Any]) -> bool:
    """Say whether a table is for the type of the model, or for the type of any of its parts."""
    parts = getattr(config, "sub_configs", {}).values()
    return transformers.AutoConfig in parts or not tables.keys().isdisjoint(_types(config))


def _types(config: Any, seen: tuple[Any, ...] = ()) -> Iterator[str]:
    yield getattr(config, "model_type", "")
    for part in getattr(config, "sub_configs", {}).values():
        if part not in seen and part is not config:
            yield from _types(part, (*seen, config))


@contextmanager
def without_initial_values() -> Iterator[None]:
    """Skip the initialization of layers, which takes half of the time even on the meta device."""
    layers = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    with ExitStack() as patches:
        for layer in layers:
            patches.enter_context(patch.object(layer, "reset_parameters", lambda _self: None))
        yield


def build(model_class: Any) -> Any:
    """Build a model on the meta device; return None if the class's config describes no model."""
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
    met: the classes and model types that were built, alone or as a part of another model.
    renames: name templates in memory by name templates in the files, for classes whose layers are
    found only by renames; by model type, and by whether the class has no head.
    wrong: why the layers of a class are not found in the class's files, by class name.
    lost: the other tensors of a class that are not found in the class's files: name in the files
    by name in memory, by class name.
    loras: for each linear layer, whether PEFT loads a LoRA under the layer's name; by class name
    and model type.
    """

    met: set[str] = field(default_factory=set)
    renames: dict[tuple[str, bool], list[dict[str, str]]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    loras: dict[tuple[str, str], dict[str, bool]] = field(default_factory=dict)


def in_files(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the name in the files of each tensor that is only renamed, by name in memory."""
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
    """Return the name in the files of the weight of each linear layer, by the name in memory."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return in_files(model, [f"{name}.weight" for name in linear])


def others_in_files(model: Any, weights: Collection[str]) -> dict[str, str]:
    """Return the name in the files of each other tensor, by its name in memory."""
    return in_files(model, model.state_dict().keys() - weights)


def walk() -> Walk:
    """Build every class that a table is for, and compare our renames with transformers'."""
    result = Walk()
    for model_class in candidates():
        model = build(model_class)
        if model is not None:
            for part in model.modules():
                if isinstance(part, transformers.PreTrainedModel):
                    result.met |= {type(part).__name__, part.config.model_type}
            _compare(model, result)
            result.loras[model_class.__name__, model.config.model_type] = _loras(model)
    return result


def _loras(model: Any) -> dict[str, bool]:
    """Return for each linear layer whether PEFT loads a LoRA under the name that PEFT saved."""
    prefix, end = "base_model.model.", ".lora_A.weight"
    modules = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    if conversion_mapping.get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return dict.fromkeys(modules, True)
    steps = peft_conversion.build_peft_weight_mapping(
        conversion_mapping.get_model_conversion_mapping(model),
        adapter_name="default",
        peft_config=peft.LoraConfig(),
    )
    renamings = [step for step in steps or () if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in steps or () if isinstance(step, loading.WeightConverter)]
    found = {}
    for module in modules:
        saved = f"{prefix}{module}{end}"
        name, converted = loading.rename_source_key(saved, renamings, converters)
        # PEFT also accepts a name that only lost its beginning.
        found[module] = converted is not None or saved.endswith(name.replace(".default", ""))
    return found


def _compare(model: Any, result: Walk) -> None:
    name, config = type(model).__name__, model.config.to_dict()
    kind = model.config.model_type
    weights = linear_in_files(model)
    others = others_in_files(model, weights)
    paths = _paths(weights | others)
    rows = _rows(set(paths.values()))

    def rows_of(tensors: Iterable[str]) -> dict[str, str]:
        found = (rows.get(paths[tensor], ("", "")) for tensor in tensors)
        return {files: memory for memory, files in found if files != memory}

    with patch.object(renames, "conversions", dict):
        reason = mismatch(weights, config)
        table = rows_of(weights) if reason else {}
    with patch.object(renames, "conversions", lambda: {kind: [table]}):
        lost = not_found(others, weights, config)
        table |= rows_of(lost)
    for form in (table, _published(kind, table)):
        if form:
            _add(form, result.renames.setdefault((kind, name.endswith("Model")), []))
    if table or kind in conversions():
        reason = mismatch(weights, config)
        lost = not_found(others, weights, config)
    if reason:
        result.wrong[name] = reason
    if lost:
        result.lost[name] = lost


def _published(kind: str, table: Mapping[str, str]) -> dict[str, str]:
    """Return a table with the names of the published files; empty if no name differs."""
    found = {}
    for files, memory in table.items():
        name = files
        for written, published in _PUBLISHED.get(kind, ()):
            name = name.replace(written, published)
        found[name] = memory
    return {} if found.keys() == table.keys() else found


def _paths(tensors: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return two paths for each tensor: those of the module, or the full names of the tensor.

    The paths of the module serve if all tensors of the module, and no other tensors, keep the last
    part of their names.
    """
    pairs = {(_module(memory), _module(files)) for memory, files in tensors.items()}
    in_memory, on_disk = (Counter(side) for side in zip(*pairs, strict=True)) if pairs else ({}, {})
    found: dict[str, tuple[str, str]] = {}
    for memory, files in tensors.items():
        module, path = _module(memory), _module(files)
        is_alone = bool(module and path) and in_memory[module] == on_disk[path] == 1
        keeps_last = memory.removeprefix(module) == files.removeprefix(path)
        found[memory] = (module, path) if is_alone and keeps_last else (memory, files)
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _add(table: dict[str, str], tables: list[dict[str, str]]) -> None:
    """Join a table with the first table that agrees with every entry, in both directions."""
    for other in tables:
        both = {*table.items(), *other.items()}
        if len(both) == len(table | other) == len({memory for _, memory in both}):
            other.update(table)
            return
    tables.append(table)


def _rows(pairs: Collection[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return two templates for each pair of a path in memory and a path in the files.

    In a template, # stands for numbers that the two paths share in the same order. Any other number
    is part of a name. Two templates are right if each pair of paths either fits both templates with
    the same numbers, or fits neither template. A path that belongs to two pairs has no right
    templates.
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        for path in pair:
            alike.setdefault(NUMBER.sub("#", path), []).append(pair)
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for pair in sorted(pairs):
        if pair in found:
            continue
        near = {each for path in pair for each in alike[NUMBER.sub("#", path)]}
        for row in _possible_rows(*pair):
            numbers = {each: [*map(_numbers, row, each)] for each in near}
            if all(memory == files for memory, files in numbers.values()):
                found |= {each: row for each, (given, _) in numbers.items() if given is not None}
                break
    return found


def _possible_rows(memory: str, files: str) -> Iterator[tuple[str, str]]:
    """Yield all pairs of templates for two paths: most # first, then first numbers first."""
    ours, theirs = memory.split("."), files.split(".")
    here, there = (_places_of_numbers(path) for path in (ours, theirs))
    for size in range(min(len(here), len(there)), -1, -1):
        for some, others in product(combinations(here, size), combinations(there, size)):
            if [ours[n] for n in some] == [theirs[n] for n in others]:
                yield _with_places(ours, some), _with_places(theirs, others)


def _places_of_numbers(parts: Sequence[str]) -> list[int]:
    return [place for place, part in enumerate(parts) if part.isdecimal()]


def _with_places(parts: Sequence[str], places: Collection[int]) -> str:
    return ".".join("#" if n in places else part for n, part in enumerate(parts))


def _numbers(template: str, path: str) -> list[str] | None:
    """Return the numbers for which # stands; None if the path does not fit the template."""
    found = re.fullmatch(re.escape(template).replace(r"\#", r"(\d+)"), path)
    return [*found.groups()] if found else None


def not_found(
    others: Mapping[str, str], weights: Mapping[str, str], config: Mapping[str, object]
) -> dict[str, str]:
    """Return the tensors beside the layers that an adapter's merge would not find in the files."""
    base = _base(weights, config, others.values())
    try:
        match = match_modules(_sizes(weights), base)
    except CheckpointError:
        return {}
    keys = {f"{PREFIX}{name}": path for name, path in others.items()}
    try:
        found = match_replacements(dict.fromkeys(keys, (8,)), match, base)
    except CheckpointError as error:
        return {"": str(error)}
    lost = {key: path for key, path in keys.items() if found[key][0].target != path}
    return {key.removeprefix(PREFIX): path for key, path in lost.items()}


def _sizes(weights: Iterable[str]) -> dict[str, int]:
    return {name.removesuffix(".weight"): 8 for name in weights}


def _base(
    weights: Mapping[str, str], config: Mapping[str, object], others: Iterable[str] = ()
) -> BaseModel:
    shapes = {**dict.fromkeys(others, (8,)), **dict.fromkeys(weights.values(), (8, 8))}
    tensors = {
        name: BaseTensor("m", TensorInfo(name, "F32", shape, 0, 0))
        for name, shape in shapes.items()
    }
    return BaseModel(Location("base", None), config, {}, tensors)


def mismatch(weights: Mapping[str, str], config: Mapping[str, object]) -> str:
    """Return why a layer of a model is not found in the files; empty if all layers are found."""
    try:
        match = match_modules(_sizes(weights), _base(weights, config))
    except CheckpointError as error:
        return str(error)
    undo = match.strategy.undo
    for memory, files in weights.items():
        found = match.tensors[memory.removesuffix(".weight")]
        if found != files:
            return f"{memory} is {files}, not {found}"
        path = files.removesuffix(".weight")
        if memory not in (undo(files), f"{undo(path)}.weight"):
            return f"{files} becomes {undo(path)}, not {memory}"
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
