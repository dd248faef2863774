"""Find the component of a pipeline under whose name Diffusers looks up a LoRA.

Read in Diffusers 0.42.1, loaders/lora_pipeline.py and loaders/lora_base.py: load_lora_weights of
a pipeline takes the names below unet, transformer, text_encoder and text_encoder_2, and
passes over all other names with a line in the log. Of text encoders, it knows CLIP's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vera_convert import rules
from vera_convert.base.facts import BaseFacts
from vera_convert.errors import CheckpointError
from vera_convert.lora.plan import LoraPlan
from vera_convert.rules import Finding
from vera_convert.text import printable

_USUAL = re.compile(r"(unet|transformer|text_encoder)(_\d)?")
_LOADED_WITH_THE_PIPELINE = ("unet", "transformer", "text_encoder", "text_encoder_2")
_TEXT_ENCODERS = ("clip", "clip_text_model")


def component_of(base_facts: BaseFacts) -> str:
    """Return the attribute of a pipeline under which Diffusers has the base.

    The base's folder in a pipeline decides. Of a component alone, the folder decides if it has a
    usual name, and otherwise the class: Wan 2.2 has two transformers of one class.

    Raises:
        CheckpointError: neither tells.
    """
    base = base_facts.base
    if base is None:
        raise _unknown("the base")
    if base.prefix:
        return base.prefix.rstrip("/")
    folder = base.location.subfolder.rpartition("/")[2] or base.location.name
    if _USUAL.fullmatch(folder):
        return folder
    found = base.config.get("_class_name")
    name = found if isinstance(found, str) else ""
    if name.startswith("UNet"):
        return "unet"
    if "Transformer" in name:
        return "transformer"
    raise _unknown(folder)


def _unknown(place: str) -> CheckpointError:
    reason = "the folder and the config do not say which component of a pipeline the base is."
    return CheckpointError(rules.LORA_BASE_UNKNOWN.at(printable(place), reason))


def component_findings(plan: LoraPlan, base_facts: BaseFacts) -> Iterator[Finding]:
    """Yield what a pipeline does with a LoRA of its component, if it does not load the LoRA.

    Raises:
        CheckpointError: the component is not known.
    """
    component = component_of(base_facts)
    model_type = base_facts.base.model_type if base_facts.base is not None else None
    if component.startswith("text_encoder") and model_type not in _TEXT_ENCODERS:
        reason = (
            f"Diffusers loads a LoRA into text encoders of CLIP alone, and {printable(component)} "
            f'has the type "{printable(model_type or "")}". With --for peft, the model itself '
            f"loads the LoRA: pipeline.{printable(component)}.load_adapter(LORA)."
        )
        yield rules.LORA_NAME_UNKNOWN.at(printable(plan.layers[0].written), reason)
    elif component not in _LOADED_WITH_THE_PIPELINE:
        shown = printable(component)
        reason = (
            f"load_lora_weights of a pipeline passes over a LoRA of {shown}. Load it with "
            f'pipeline.{shown}.load_lora_adapter(LORA, prefix="{shown}", use_safetensors=True).'
        )
        yield rules.LORA_COMPONENT_APART.at(shown, reason)
