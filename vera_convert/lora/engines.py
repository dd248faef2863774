"""The rules of each engine for a LoRA, in one table, read in the engines' own sources.

Every other module asks this table, so a new release of an engine changes this module and
``engines.toml`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path


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


_TEXT_MODEL = r"((model|language_model|llm|thinker|decoder|transformer|backbone)\.)*"
_TOWER = re.compile(r"(.+\.)?(vision|visual|vit|audio|speech|image|multi_modal|mm_)\w*\..+")
_EXPERT = re.compile(r"(.+\.experts)\.[0-9]+\..+")


@cache
def _without_lora() -> Mapping[str, frozenset[str]]:
    """Return the architectures that take no LoRA, by the title of the engine."""
    import tomllib  # `--help` reads this module, and no table

    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return {title: frozenset(names.split()) for title, names in tomllib.loads(text).items()}


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
        checked: the release in which the rules were read, and where.
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
    """

    title: str
    checked: str
    form: Form = Form.PEFT
    base_names: bool = False
    ranks: tuple[int, ...] = ()
    fast_rank: int = 0
    every_layer: bool = False
    whole_experts: bool = False
    one_of_a_kind: bool = False
    partners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needed_in_base: Mapping[str, str] = field(default_factory=dict)
    whole_in: Mapping[str, frozenset[str]] = field(default_factory=dict)
    known_modules: re.Pattern[str] | None = None
    heads: frozenset[str] | None = frozenset()
    biases: bool = False
    conv1d: bool = True
    tied_head: bool = True
    components: bool = False
    renames_targets: bool = False
    start: str = ""
    tower: str = ""

    @property
    def refused(self) -> frozenset[str]:
        """The architectures, as a base's config names them, that take no LoRA."""
        return _without_lora().get(self.title, frozenset())

    def server_rank(self, rank: int) -> int | None:
        """Return the rank to start a server with; None if the engine serves no LoRA of `rank`."""
        if not self.ranks:
            return rank
        return next((allowed for allowed in self.ranks if allowed >= rank), None)


ENGINES: Mapping[EngineName, Engine] = {
    EngineName.PEFT: Engine(
        "PEFT",
        "PEFT 0.21.2: tuners/lora/config.py, utils/save_and_load.py",
        heads=None,
        biases=True,
        components=True,
        renames_targets=True,
    ),
    EngineName.VLLM: Engine(
        "vLLM",
        "vLLM 0.33.0: config/lora.py, lora/peft_helper.py, lora/lora_model.py, lora/utils.py, "
        "lora/model_manager.py, lora/lora_weights.py, model_executor/models/registry.py",
        base_names=True,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        whole_experts=True,
        heads=frozenset(("classifier", "score")),
        start="--enable-lora --max-lora-rank {rank} --lora-modules vera={path}",
        tower="--enable-tower-connector-lora",
    ),
    EngineName.SGLANG: Engine(
        "SGLang",
        "SGLang 0.5.23: srt/lora/lora.py, srt/lora/lora_manager.py, srt/lora/mem_pool.py, "
        "srt/lora/utils.py, srt/layers/utils/common.py",
        base_names=True,
        whole_experts=True,
        one_of_a_kind=True,
        partners={
            "q_proj": ("v_proj",),
            "k_proj": ("q_proj", "v_proj"),
            "v_proj": ("q_proj",),
            "up_proj": ("gate_proj",),
        },
        needed_in_base={"q_proj": "v_proj"},
        # The config names w1, w2 and w3, and SGLang wraps experts by gate_up_proj and down_proj.
        known_modules=re.compile(
            _TEXT_MODEL + r"(layers\.[0-9]+\.(?!.*experts\.[0-9]+\.w[123]$).+|lm_head)"
        ),
        start="--enable-lora --max-lora-rank {rank} --lora-paths vera={path}",
    ),
    EngineName.TGI: Engine(
        "TGI (LoRAX)",
        "text-generation-inference 3.3: server/adapters/lora.py, server/utils/adapter.py",
        base_names=True,
        fast_rank=128,
        every_layer=True,
        known_modules=re.compile(
            r"model\.layers\.[0-9]+\.(self_attn\.(q|k|v|qkv|o)_proj"
            r"|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))|lm_head"
        ),
        start="--lora-adapters vera={path}",
    ),
    EngineName.DIFFUSERS: Engine(
        "Diffusers",
        "Diffusers 0.42.1: loaders/lora_pipeline.py, loaders/lora_base.py, loaders/peft.py",
        form=Form.DIFFUSERS,
        components=True,
    ),
    EngineName.MLX: Engine(
        "MLX-LM",
        "MLX-LM 0.32.2: tuner/utils.py, tuner/lora.py, models/deepseek_v3.py",
        form=Form.MLX,
        base_names=True,
        whole_in={"kv_b_proj": frozenset(("deepseek_v2", "minicpm3", "youtu_llm"))},
        # MLX-LM stacks routed experts in one module.
        known_modules=re.compile(
            r"(language_model\.)?model\.layers\.[0-9]+\.(?!.*experts\.[0-9]+\.).+|lm_head"
        ),
        conv1d=False,
        tied_head=False,
        start="--adapter-path {path}",
    ),
    EngineName.GGUF: Engine(
        "llama.cpp",
        "llama.cpp of xllamacpp 2026.10.11549; gguf 0.19.0: tensor_mapping.py, gguf_writer.py",
        form=Form.GGUF,
        base_names=True,
        conv1d=False,
        tied_head=False,
        start="--lora {path}/adapter.gguf",
    ),
}
"""The engines, by the name for `--for`."""
