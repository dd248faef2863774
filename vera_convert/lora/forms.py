"""The files in which an engine reads a LoRA: names, orientation, config.

GGUF, which is no safetensors file, has a module of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.lora_record import DIFFUSERS_NAME, MLX_NAME
from vera_convert.adapter.names import PREFIX
from vera_convert.base.facts import BaseFacts
from vera_convert.base.unsupported_layouts import Layers
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.lora.engines import Engine, Form
from vera_convert.lora.peft_form import Extras, config_text, target_names
from vera_convert.lora.pipeline_component import component_of
from vera_convert.lora.plan import LoraLayer, LoraPlan, has_base_names
from vera_convert.targets.linear import kind_of

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
        own = _diffusers_metadata(config, plan, modules)
        named = {f"{component}.{key}": value for key, value in own.items()}
        metadata = {DIFFUSERS_METADATA: json.dumps(named, sort_keys=True)}
        prefix, naming = f"{component}.", f"{naming}, under {component}"
        return FormFiles(DIFFUSERS_NAME, naming, prefix, below=prefix, metadata=metadata)
    text = config_text(config, plan, extras, modules=modules)
    return FormFiles(WEIGHTS_NAME, naming, PREFIX, config=text)


# --- Diffusers -----------------------------------------------------------------------------------


def _diffusers_metadata(
    config: VeraConfig, plan: LoraPlan, modules: Collection[str]
) -> Mapping[str, object]:
    written = [layer.written for layer in plan.layers]
    return {
        "r": plan.rank,
        "lora_alpha": plan.rank,
        "target_modules": target_names(written, modules, config)[0],
        "use_dora": False,
        "use_rslora": False,
    }


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
