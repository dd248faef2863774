"""Find the component of a pipeline under whose name Diffusers looks up a LoRA.

Read in Diffusers 0.42.1, loaders/lora_pipeline.py, lora_base.py and peft.py: load_lora_weights of a
pipeline takes the names below the components that the pipeline's class lists, and passes over all
other names with a line in the log. Of text encoders, Diffusers knows CLIP's. A component of a class
that is a PeftAdapterMixin loads a LoRA itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vera_convert import rules
from vera_convert.base.facts import BaseFacts
from vera_convert.base.model import BaseModel, pipeline_class
from vera_convert.errors import CheckpointError
from vera_convert.hub.lookup import HubAccess
from vera_convert.lora.engines import engines_for
from vera_convert.lora.plan import LoraPlan
from vera_convert.rules import Finding
from vera_convert.tables import table
from vera_convert.text import printable

_IF_COMPONENT = "If the base is such a component, give the folder of the pipeline with --base."
_USUAL = re.compile(r"(unet|transformer|text_encoder)(_\d)?")


def diffusers() -> Mapping[str, Any]:
    """Return the facts of Diffusers: names of components and classes of pipelines."""
    return table(__file__, "pipeline_component.toml")


def component_of(base_facts: BaseFacts) -> str:
    """Return the attribute of a pipeline under which Diffusers has the base.

    The base's folder in a pipeline decides. Of a component alone, the folder decides if it has a
    usual name, and otherwise the class: Wan 2.2 has two transformers of one class.

    Raises:
        CheckpointError: neither tells.
    """
    base = _base_of(base_facts)
    if base.prefix:
        return base.prefix.rstrip("/")
    folder = base.location.subfolder.rpartition("/")[2] or base.location.name
    if _USUAL.fullmatch(folder):
        return folder
    name = _class_name(base)
    for classes, attribute in diffusers()["attributes"].items():
        if re.fullmatch(classes, name):
            return str(attribute)
    kind = base.model_type
    reason = "neither the base's folder nor its config names a component of a pipeline."
    if kind:
        reason = f"the base is a model of type {printable(kind)}, no component of a pipeline."
    found = rules.LORA_BASE_UNKNOWN.at(base.location.label, reason)
    raise CheckpointError(found.with_remedy(f"{engines_for(base)} {_IF_COMPONENT}"))


def _base_of(base_facts: BaseFacts) -> BaseModel:
    if base_facts.base is None:
        reason = "without the base, nothing says which component of a pipeline was trained."
        found = rules.LORA_BASE_UNKNOWN.at("the base", reason)
        raise CheckpointError(found.with_remedy(f"Pass --for peft. {_IF_COMPONENT}"))
    return base_facts.base


def _class_name(base: BaseModel) -> str:
    """Return the class of Diffusers that a component's config names; empty for any other base."""
    found = base.config.get("_class_name")
    return found if isinstance(found, str) else ""


def component_findings(
    plan: LoraPlan, base_facts: BaseFacts, access: HubAccess
) -> Iterator[Finding]:
    """Yield what a pipeline does with a LoRA of its component, if it does not load the LoRA.

    Args:
        plan: the LoRA.
        base_facts: the base facts.
        access: how the Hub is reached, for the index of the pipeline.

    Raises:
        CheckpointError: the component is not known.
        SurroundingsError: the index of the pipeline cannot be read.
    """
    component, base = component_of(base_facts), _base_of(base_facts)
    shown, kind = printable(component), _class_name(base)
    pipeline, reason = pipeline_class(base, access), ""
    loads_none = pipeline.removesuffix("Pipeline") in diffusers()["pipelines"].split()
    if component.startswith("text_encoder"):
        reason = _of_text_encoder(shown, base, pipeline, loads_none=loads_none)
    elif kind in diffusers()["components"].split():
        reason = (
            f"Diffusers loads no LoRA into a {kind}. With --for peft, PEFT loads the LoRA: "
            f"PeftModel.from_pretrained(pipeline.{shown}, LORA)."
        )
    elif loads_none or component not in diffusers()["loaded"].split():
        why = (
            f"load_lora_weights is missing in the class {pipeline}."
            if loads_none
            else f"load_lora_weights of a pipeline passes over a LoRA of {shown}."
        )
        call = f'load_lora_adapter(LORA, prefix="{shown}", use_safetensors=True)'
        way = f"{why} This call loads the LoRA: pipeline.{shown}.{call}."
        yield rules.LORA_COMPONENT_APART.at(shown, way)
    if reason:
        yield rules.LORA_NAME_UNKNOWN.at(printable(plan.layers[0].written), reason)


def _of_text_encoder(shown: str, base: BaseModel, pipeline: str, *, loads_none: bool) -> str:
    """Return why a pipeline loads no LoRA into a text encoder; empty if the pipeline loads one."""
    if base.model_type not in diffusers()["text_encoders"].split():
        reason = (
            f"Diffusers loads a LoRA into text encoders of CLIP alone, and {shown} "
            f'has the type "{printable(base.model_type or "")}".'
        )
    elif loads_none:
        reason = f"load_lora_weights is missing in the class {pipeline}."
    elif re.fullmatch(diffusers()["transformer_alone"], pipeline):
        reason = f"a {printable(pipeline)} loads a LoRA into its transformer alone."
    else:
        return ""
    way = f"the model itself loads the LoRA: pipeline.{shown}.load_adapter(LORA)."
    return f"{reason} With --for peft, {way}"
