"""Layers loaded by PEFT for VeRA, and not for a LoRA: PEFT decides by the model's type.

Read in PEFT 0.21.2 (utils/transformers_weight_conversion.py, tuners/tuners_utils.py) beside
transformers 5.24. PEFT compares the last part of a target, so a longer target changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

_MIXTRAL = frozenset(("mixtral", "minimax", "minimax_m2"))
_QWEN = frozenset(
    (
        "afmoe",
        "beam",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "longcat_flash",
        "mellum",
        "olmoe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "sarvam_mla",
        "solar_open",
    )
)
_EXPERT = re.compile(r"(.+\.experts)\.[0-9]+\.[^.]+")
_FUSED: Mapping[frozenset[str], Mapping[str, str]] = {
    _MIXTRAL: {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    _QWEN: {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
}
"""The parameter of the fused experts that PEFT makes of a name, by the models' types.

PEFT maps the router's ``gate`` too, to a parameter of the same path, so nothing is lost.
"""

_MAMBA = frozenset(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"))
_NOT_IN_MAMBA = frozenset(("out_proj", "conv1d"))


def lost_to_experts(
    modules: Sequence[str], base_modules: Collection[str], model_type: str
) -> list[str]:
    """Return the modules whose LoRA PEFT takes for a part of the model's fused experts, and loses.

    The LoRA of experts under the names of transformers 4 is loaded if each expert of a
    layer has one. The LoRA of gate and up is loaded only beside one of down.

    Args:
        modules: the paths of all modules of the LoRA.
        base_modules: the paths of all modules of the base.
        model_type: the field of the base's config.
    """
    names = next((names for types, names in _FUSED.items() if model_type in types), {})
    there = Counter(_fused(module, names) for module in modules)
    needed = Counter(_fused(module, names) for module in base_modules)
    has_down = any(parameter == "down_proj" for _, parameter in there)
    lost = []
    for module in modules:
        container, parameter = place = _fused(module, names)
        is_whole = container and has_down and there[place] == needed[place]
        if parameter and not is_whole:
            lost.append(module)
    return lost


def _fused(module: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return the experts that a module is one of, and PEFT's parameter; empty if there is none."""
    expert = _EXPERT.fullmatch(module)
    return expert[1] if expert else "", names.get(module.rpartition(".")[2], "")


def refused_in_mamba(modules: Sequence[str], model_type: str) -> list[str]:
    """Return the modules of which PEFT refuses a LoRA because the model is a Mamba.

    Args:
        modules: the paths of all modules of the LoRA.
        model_type: the field of the base's config.
    """
    if model_type not in _MAMBA:
        return []
    return [module for module in modules if module.rpartition(".")[2] in _NOT_IN_MAMBA]


_RENAMED: Mapping[str, str] = {
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), r"(?:model\.)?language_model\..+"),
    "maskformer": (
        r"(?:.+\.)?pixel_level_module\.encoder\..+\.(?:attention|intermediate|output)\..+"
    ),
    **dict.fromkeys(
        ("laguna", "mistral_large4", "mistral_large4_text"), r".+\.mlp\.shared_experts\..+"
    ),
    "pi0": r"embed_action_time\..+",
    **dict.fromkeys(
        ("inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text"),
        r".+\.sconv\.weight_proj",
    ),
}
"""Present names that PEFT renames as if an old checkpoint had them, by the model's type."""


def renamed_on_loading(modules: Sequence[str], model_type: str) -> list[str]:
    """Return the modules of which PEFT loads a LoRA under another name, and loses the LoRA.

    Args:
        modules: the paths of all modules of the LoRA.
        model_type: the field of the base's config.
    """
    pattern = re.compile(_RENAMED.get(model_type, r"(?!)"))
    return [module for module in modules if pattern.fullmatch(module)]
