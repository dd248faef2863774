"""Layers loaded by PEFT for VeRA, and not for a LoRA: PEFT decides by the model's type.

Read in PEFT 0.21.2 (utils/transformers_weight_conversion.py, tuners/tuners_utils.py) beside
transformers 5.24. PEFT compares the last part of a target, so a longer target changes nothing.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_EXPERT = re.compile(r"(.+\.experts)\.[0-9]+\.[^.]+")
_NOT_IN_MAMBA = frozenset(("out_proj", "conv1d"))


@cache
def _tables() -> Mapping[str, Any]:
    """Return the tables by types of models."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


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
    fused = (each for each in _tables()["fused"] if model_type in each["types"].split())
    names: Mapping[str, str] = next((each["parameters"] for each in fused), {})
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
    if model_type not in _tables()["mamba"].split():
        return []
    return [module for module in modules if module.rpartition(".")[2] in _NOT_IN_MAMBA]


def renamed_on_loading(modules: Sequence[str], model_type: str) -> list[str]:
    """Return the modules of which PEFT loads a LoRA under another name, and loses the LoRA.

    Args:
        modules: the paths of all modules of the LoRA.
        model_type: the field of the base's config.
    """
    renamed = _tables()["renamed"].items()
    patterns = [pattern for pattern, types in renamed if model_type in types.split()]
    return [each for each in modules if any(re.fullmatch(found, each) for found in patterns)]
