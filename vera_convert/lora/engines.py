"""The rules of each engine for a LoRA.

Every other module asks this module, so a new release of an engine changes ``engines.toml`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from vera_convert.tables import table

if TYPE_CHECKING:  # `--help` reads this module, and starts without NumPy
    from vera_convert.base.model import BaseModel


class EngineName(StrEnum):
    """How `--for` names an engine."""

    PEFT = "peft"
    VLLM = "vllm"
    SGLANG = "sglang"
    TGI = "tgi"
    DIFFUSERS = "diffusers"
    MLX = "mlx"
    GGUF = "gguf"


class Form(StrEnum):
    """The files in which an engine reads a LoRA."""

    PEFT = "peft"
    DIFFUSERS = "diffusers"
    MLX = "mlx"
    GGUF = "gguf"


_TOWER = re.compile(r"(.+\.)?(vision|visual|vit|audio|speech|image|multi_modal|mm_)\w*\..+")
_EXPERT = re.compile(r"(.+\.experts)\.[0-9]+\..+")


def is_in_tower(module: str) -> bool:
    """Say whether a module belongs to the vision or audio tower of a model with a text model."""
    return _TOWER.fullmatch(module) is not None


def experts_of(module: str) -> str:
    """Return the path of the routed experts around a module; empty without experts."""
    found = _EXPERT.fullmatch(module)
    return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class Engine:
    """The rules of one engine.

    Attributes:
        title: how messages call the engine.
        form: the engine's files.
        base_names: whether the engine looks modules up by name in the base's files;
            otherwise by name in memory, as the adapter does.
        ranks: the ranks for which a server can be started, ascending; empty if any rank will do.
        fast_rank: the rank up to which the engine's own kernels work; 0 if there is no limit.
        every_layer: whether a kind of layer is dropped unless each of the model's layers has a
            LoRA of this kind.
        whole_experts: whether routed experts must all be adapted, each with all projections.
        one_of_a_kind: whether two modules of a layer with the same last name overwrite each other.
        partners: the modules to adapt beside a module, by the last part of the module's path.
        needed_in_base: the module without which the engine refuses a module of the same path, by
            the last parts of both paths.
        whole_in: the types of models in which the engine keeps a module whole, by the last part of
            the module's path; in other models the engine has several modules in its place.
        known_modules: the pattern of the engine's module paths; None for any path.
        heads: the names of modules to replace whole; None for any module.
        biases: whether trained biases are taken.
        conv1d: whether bases with Conv1D layers, such as GPT-2, are taken.
        tied_head: whether an output head with the embedding's tensor can be adapted.
        components: whether the engine loads the LoRA of a component of a diffusion pipeline.
        renames_targets: whether PEFT loads the LoRA, and reads names by the model's type.
        start: the arguments that start a server for the adapter, with ``{rank}`` and ``{path}``.
        tower: the further argument without which layers of a vision or audio tower are left out.
        without_lora: the architectures, as a base's config names them, that take no LoRA.
        architectures: the engine's name of the base's architecture, by the model_type of
            transformers; empty if the engine reads the base's own config.
    """

    title: str
    form: Form
    base_names: bool = False
    ranks: Sequence[int] = ()
    fast_rank: int = 0
    every_layer: bool = False
    whole_experts: bool = False
    one_of_a_kind: bool = False
    partners: Mapping[str, Sequence[str]] = field(default_factory=dict)
    needed_in_base: Mapping[str, str] = field(default_factory=dict)
    whole_in: Mapping[str, Sequence[str]] = field(default_factory=dict)
    known_modules: str | None = None
    heads: Sequence[str] | None = None
    biases: bool = False
    conv1d: bool = True
    tied_head: bool = True
    components: bool = False
    renames_targets: bool = False
    start: str = ""
    tower: str = ""
    without_lora: str = ""
    architectures: Mapping[str, str] = field(default_factory=dict)

    @property
    def refused(self) -> frozenset[str]:
        """The architectures, as a base's config names them, that take no LoRA."""
        return frozenset(self.without_lora.split())

    def knows(self, module: str) -> bool:
        """Say whether the engine looks a module up."""
        known = self.known_modules
        return known is None or re.fullmatch(known, module) is not None

    def server_rank(self, rank: int) -> int | None:
        """Return the rank to start a server with; None if the engine serves no LoRA of `rank`."""
        if not self.ranks:
            return rank
        return next((allowed for allowed in self.ranks if allowed >= rank), None)


@cache
def engines() -> Mapping[EngineName, Engine]:
    """Return the rules of each engine, by the name for `--for`."""
    return {
        EngineName(name): Engine(**rules | {"form": Form(rules["form"])})
        for name, rules in table(__file__, "engines.toml").items()
    }


def engines_for(base: BaseModel) -> str:
    """Return the remedy that names each engine that takes a LoRA of a base of this kind."""
    is_component = isinstance(base.config.get("_class_name"), str) or bool(base.prefix)
    names = [
        str(name)
        for name, engine in engines().items()
        if (engine.components if is_component else name is not EngineName.DIFFUSERS)
        and engine.refused.isdisjoint(base.class_names[:1])
        and (not engine.architectures or base.model_type in engine.architectures)
    ]
    others, last = ", ".join(names[:-1]), names[-1]
    return f"Pass --for {others} or {last}." if others else f"Pass --for {last}."
