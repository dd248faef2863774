"""What each engine takes as a LoRA: one table, read in the engines' own sources.

Every other module asks this table. An engine that changes its mind is a change here alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


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


@dataclass(frozen=True, slots=True)
class Engine:
    """What one engine takes.

    Attributes:
        title: how messages call the engine.
        checked: the release in which the rules were read, and where.
        form: the files that the engine reads.
        base_names: whether the engine looks modules up by their names in the base's files;
            otherwise by their names in memory, which are the adapter's.
        ranks: the ranks that a server can be started for, ascending; empty if any rank will do.
        fast_rank: the rank up to which the engine's own kernels work; 0 if there is no limit.
        every_layer: whether a kind of layer is dropped unless each of the model's layers has one.
        partners: the modules that must be adapted beside a module, by the last part of its path.
        known_modules: the pattern of the module paths that the engine looks up; None for any.
        heads: the names of modules that may be replaced whole; None for any module.
        biases: whether trained biases are taken.
        conv1d: whether bases with Conv1D layers, such as GPT-2, are taken.
        tied_head: whether an output head that shares the embedding's tensor can be adapted.
        renames_targets: whether PEFT loads the LoRA, and reads names by the model's type.
        start: the arguments that start a server for the adapter, with ``{rank}`` and ``{path}``.
    """

    title: str
    checked: str
    form: Form = Form.PEFT
    base_names: bool = False
    ranks: tuple[int, ...] = ()
    fast_rank: int = 0
    every_layer: bool = False
    partners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known_modules: re.Pattern[str] | None = None
    heads: frozenset[str] | None = frozenset()
    biases: bool = False
    conv1d: bool = True
    tied_head: bool = True
    renames_targets: bool = False
    start: str = ""

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
        renames_targets=True,
    ),
    EngineName.VLLM: Engine(
        "vLLM",
        "vLLM 0.33.0: config/lora.py, lora/peft_helper.py, lora/lora_model.py, lora/utils.py",
        base_names=True,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        heads=frozenset(("classifier", "score")),
        start="--enable-lora --max-lora-rank {rank} --lora-modules vera={path}",
    ),
    EngineName.SGLANG: Engine(
        "SGLang",
        "SGLang 0.5.23: srt/lora/lora.py, srt/lora/lora_manager.py, srt/layers/utils/common.py",
        base_names=True,
        partners={
            "q_proj": ("v_proj",),
            "k_proj": ("q_proj", "v_proj"),
            "v_proj": ("q_proj",),
            "up_proj": ("gate_proj",),
        },
        known_modules=re.compile(r".*layers\.[0-9]+\..+|(.+\.)?lm_head"),
        start="--enable-lora --max-lora-rank {rank} --lora-paths vera={path}",
    ),
    EngineName.TGI: Engine(
        "TGI and LoRAX",
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
        "Diffusers 0.42.1: loaders/peft.py, utils/peft_utils.py",
        form=Form.DIFFUSERS,
    ),
    EngineName.MLX: Engine(
        "MLX-LM",
        "MLX-LM 0.32.2: tuner/utils.py, tuner/lora.py",
        form=Form.MLX,
        base_names=True,
        known_modules=re.compile(r"(language_model\.)?model\.layers\.[0-9]+\..+|lm_head"),
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
"""The engines, by the name that `--for` takes."""
