"""The config of a LoRA as PEFT writes it; vLLM, SGLang, TGI and LoRAX read the same file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.files.tensorfile import TensorData
from vera_convert.lora.plan import LoraPlan
from vera_convert.targets.matching import matching


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
    modules = {each: _names_of(each, saved) for each in adapter.trained_replacements}
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


def _names_of(tensor: TensorData, saved: SavedModules) -> frozenset[str]:
    return saved.of(replaced_name(tensor.name).rpartition(".")[0])


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
