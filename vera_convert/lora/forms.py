"""The files in which an engine reads a LoRA: names, orientation, config.

vLLM, SGLang, TGI and LoRAX read the files of PEFT. GGUF, which is no safetensors file, has a module
of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.lora_record import DIFFUSERS_NAME, MLX_NAME
from vera_convert.adapter.names import PREFIX
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.base.facts import BaseFacts
from vera_convert.base.unsupported_layouts import Layers
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.lora.engines import Engine, Form
from vera_convert.lora.pipeline_component import component_of
from vera_convert.lora.plan import LoraLayer, LoraPlan, has_base_names
from vera_convert.targets.linear import kind_of
from vera_convert.targets.matching import matching

DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class FormFiles:
    """How a LoRA lies in the files of one form.

    Attributes:
        weights: the name of the weights.
        naming: how the form names layers, for people.
        prefix: what stands before the path of a module in the name of a tensor.
        below: the part of `prefix` in the name of a layer.
        endings: what stands after the path, for lora_A and lora_B.
        transposed: whether the factors are stored as (in, rank) and (rank, out).
        metadata: metadata of the weights beside the record.
        config: the bytes of ``adapter_config.json``; None if the form has no such file.
    """

    weights: str
    naming: str
    prefix: str = ""
    below: str = ""
    endings: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    transposed: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: bytes | None = None

    def name(self, layer: LoraLayer) -> str:
        """Return the name of a layer in the files."""
        return f"{self.below}{layer.written}"

    def names(self, layer: LoraLayer) -> tuple[str, str]:
        """Return the names of a layer's two tensors."""
        first, second = self.endings
        return f"{self.prefix}{layer.written}{first}", f"{self.prefix}{layer.written}{second}"


def files_of(
    engine: Engine, config: VeraConfig, plan: LoraPlan, extras: Extras, base_facts: BaseFacts
) -> FormFiles:
    """Return how a LoRA lies in an engine's files of safetensors.

    Args:
        engine: the engine.
        config: the VeRA adapter's.
        plan: the LoRA.
        extras: the heads and biases stored with the LoRA.
        base_facts: the base facts.

    Raises:
        CheckpointError: the component of a pipeline is not known.
    """
    modules, naming, base = base_facts.modules, "as in the adapter", base_facts.base
    if base is not None and has_base_names(engine, base_facts):
        modules = frozenset(name.removesuffix(".weight") for name in base.tensors)
        naming = "as in the base's files"
    elif base is not None and base_facts.match is not None:
        modules |= {*Layers(base).joined(base_facts.match.strategy.undo)}
    if engine.form is Form.MLX:
        endings, text = (".lora_a", ".lora_b"), _mlx_config(config, plan, modules)
        return FormFiles(MLX_NAME, naming, endings=endings, transposed=True, config=text)
    if engine.form is Form.DIFFUSERS:
        component = component_of(base_facts)
        written = [layer.written for layer in plan.layers]
        own = {
            "r": plan.rank,
            "lora_alpha": plan.rank,
            "target_modules": target_names(written, modules, config)[0],
            "use_dora": False,
            "use_rslora": False,
        }
        named = {f"{component}.{key}": value for key, value in own.items()}
        metadata = {DIFFUSERS_METADATA: json.dumps(named, sort_keys=True)}
        prefix, naming = f"{component}.", f"{naming}, under {component}"
        return FormFiles(DIFFUSERS_NAME, naming, prefix, below=prefix, metadata=metadata)
    text = config_text(config, plan, extras, modules=modules)
    return FormFiles(WEIGHTS_NAME, naming, PREFIX, config=text)


# --- the tensors in place of the base's -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extras:
    """The tensors of an adapter in place of the base's.

    Attributes:
        heads: the tensors of modules_to_save, and embeddings.
        biases: the trained biases.
        saved: the names of the heads in modules_to_save.
        copies: the base's weights of adapted heads.
    """

    heads: tuple[TensorData, ...] = ()
    biases: tuple[TensorData, ...] = ()
    saved: tuple[str, ...] = ()
    copies: tuple[TensorData, ...] = ()

    @property
    def tensors(self) -> tuple[TensorData, ...]:
        """Heads and biases."""
        return (*self.heads, *self.biases)

    @property
    def stored(self) -> tuple[TensorData, ...]:
        """The tensors that a LoRA stores for PEFT."""
        return (*self.tensors, *self.copies)


def extras_of(adapter: Adapter) -> Extras:
    """Sort the tensors of an adapter, vectors aside: heads, biases, copies of the base."""
    saved = SavedModules(adapter.config)
    modules = {
        each: saved.of(replaced_name(each.name).rpartition(".")[0])
        for each in adapter.trained_replacements
    }
    biases = [each for each, names in modules.items() if _is_bias(each) and not names]
    heads = [each for each, names in modules.items() if names or not _is_bias(each)]
    stored = {name for names in modules.values() for name in names}
    declared = adapter.config.modules_to_save or ()
    return Extras(
        tuple(heads),
        tuple(biases),
        saved=tuple(dict.fromkeys((*declared, *sorted(stored)))),
        copies=tuple(adapter.base_copies.values()),
    )


def _is_bias(tensor: TensorData) -> bool:
    return tensor.name.rpartition(".")[2] == "bias"


# --- PEFT ----------------------------------------------------------------------------------------


def config_text(
    config: VeraConfig, plan: LoraPlan, extras: Extras, *, modules: Collection[str]
) -> bytes:
    """Return the bytes of ``adapter_config.json``, in PEFT's order and layout.

    Args:
        config: the VeRA adapter's.
        plan: the LoRA.
        extras: the heads and biases stored with the LoRA.
        modules: every module with a weight, by the LoRA's names; empty if not known.
    """
    written = [layer.written for layer in plan.layers]
    targets, limits = target_names(written, modules, config)
    document: Mapping[str, object] = {
        "alpha_pattern": {},
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": _bias(config, extras),
        "fan_in_fan_out": any(layer.shape.conv1d for layer in plan.layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": config.layers_pattern if limits else None,
        "layers_to_transform": config.layers_to_transform if limits else None,
        "lora_alpha": plan.rank,
        "lora_dropout": config.vera_dropout,
        "modules_to_save": list(extras.saved) or None,
        "peft_type": "LORA",
        "r": plan.rank,
        "rank_pattern": {},
        "revision": config.revision,
        "target_modules": targets,
        "task_type": config.task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(document, indent=2, sort_keys=True).encode()


def _bias(config: VeraConfig, extras: Extras) -> str:
    if not extras.biases:
        return "none"
    return "all" if config.bias == "all" else "lora_only"


def target_names(
    written: Sequence[str], modules: Collection[str], config: VeraConfig
) -> tuple[list[str], bool]:
    """Return names that match exactly the converted modules, by PEFT's rule for a list.

    A name matches a module of this name, and a module whose path ends with a dot and the name. The
    adapter's own list is kept if the list matches exactly the converted modules. Otherwise only
    names that match no other module are taken: first the adapter's own names, then the shortest
    endings of paths, last full paths. PEFT refuses a name that matches a module of several layers.

    Args:
        written: the converted modules.
        modules: every module of the model; empty if not known.
        config: the VeRA adapter's.

    Returns:
        The names, and whether the config's ``layers_to_transform`` goes with the names.
    """
    wanted, own = frozenset(written), config.target_modules
    everything = sorted({*written, *modules})
    if isinstance(own, tuple) and modules:
        limited = config.layers_to_transform not in (None, ())
        for limits in (True, False) if limited else (False,):
            limit = config.layers_to_transform if limits else None
            asked = replace(config, layers_to_transform=limit)
            if frozenset(matching(everything, asked)) == wanted:
                return sorted(own), limits
    unwanted = {*modules, *_containers(everything)} - wanted
    others = frozenset(end for other in unwanted for end in _endings(other))
    endings = {end for module in written for end in _endings(module)} - others
    found = endings.intersection(own if isinstance(own, tuple) and modules else ())
    for module in written:
        if found.isdisjoint(_endings(module)):
            found.add(_shortest(module, others) if modules else module)
    return sorted(found), False


def _containers(modules: Iterable[str]) -> frozenset[str]:
    """Return the paths of the modules that contain others."""
    paths = (accumulate(module.split(".")[:-1], "{}.{}".format) for module in modules)
    return frozenset(chain.from_iterable(paths))


def _endings(module: str) -> Iterator[str]:
    """Yield what a path ends with, from an element on, the shortest first."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def _shortest(module: str, others: Collection[str]) -> str:
    """Return the shortest ending without a leading index that no other module has."""
    endings = (
        end
        for end in _endings(module)
        if end not in others and not end.partition(".")[0].isdecimal()
    )
    return next(endings, module)


# --- MLX-LM --------------------------------------------------------------------------------------


def _mlx_config(config: VeraConfig, plan: LoraPlan, modules: Collection[str]) -> bytes:
    written = [layer.written for layer in plan.layers]
    document = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": config.vera_dropout,
            "keys": mlx_keys(written, modules),
            "rank": plan.rank,
            "scale": 1.0,
        },
        "model": config.base_model_name_or_path,
        "num_layers": layer_count(modules or written),
    }
    return json.dumps(document, indent=2, sort_keys=True).encode()


def layer_count(modules: Collection[str]) -> int:
    """Return how many layers a model has by the paths of the modules."""
    found = (re.search(r"(?:^|\.)layers\.(\d{1,6})\.", module) for module in modules)
    return 1 + max((int(each[1]) for each in found if each is not None), default=-1)


def mlx_keys(written: Sequence[str], modules: Collection[str]) -> list[str]:
    """Return the paths of MLX-LM's LoRA layers.

    A path inside a layer stands for that module in every layer. Full paths are written if some
    layers lack the module, or if the model's modules are not known.
    """
    wanted = frozenset(written)
    rest = {kind_of(module) for module in {*modules} - wanted}
    return sorted(
        {
            kind_of(module) if modules and kind_of(module) not in rest else module
            for module in written
        }
    )
