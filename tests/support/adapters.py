"""A small, valid adapter, written by the safetensors library, for tests to change or to spoil."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vera_convert.draws.generator import Draw, Variant

RANK, HIDDEN = 4, 16
OUTPUTS = {"q_proj": 16, "v_proj": 8}
KEY = 7

CONFIG: Mapping[str, object] = {
    "auto_mapping": None,
    "base_model_name_or_path": "example/tiny-llama",
    "bias": "none",
    "d_initial": 0.1,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "VERA",
    "peft_version": "0.21.2",
    "projection_prng_key": KEY,
    "r": RANK,
    "revision": None,
    "save_projection": True,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "vera_dropout": 0.0,
}
"""The fields that PEFT 0.21 writes into adapter_config.json."""


def good_tensors(*, stripped: bool = False) -> dict[str, NDArray[Any]]:
    """Return the tensors of two adapted layers, q_proj and v_proj, with A and B of the key."""
    values = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {}
    for layer in range(2):
        for target, outputs in OUTPUTS.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{module}.vera_lambda_b"] = values.normal(size=outputs).astype(np.float32)
            tensors[f"{module}.vera_lambda_d"] = values.normal(size=RANK).astype(np.float32)
    if not stripped:
        A, B = Draw(
            Variant.FLOAT32_FUSED,
            key=KEY,
            rank=RANK,
            in_features=HIDDEN,
            out_features=max(OUTPUTS.values()),
        ).matrices()
        tensors |= {"base_model.vera_A": A, "base_model.vera_B": B}
    return tensors


def good_adapter(
    folder: Path,
    *,
    stripped: bool = False,
    tensors: Mapping[str, NDArray[Any] | None] | None = None,
    metadata: Mapping[str, str] | None = None,
    **config: object,
) -> Path:
    """Write a valid adapter with changes into a new folder; a tensor of value None is left out."""
    folder.mkdir(parents=True)
    document = {**CONFIG, "save_projection": not stripped, **config}
    text = json.dumps(document, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_bytes(text.encode())
    stored = {**good_tensors(stripped=stripped), **(tensors or {})}
    save_file(
        {name: array for name, array in stored.items() if array is not None},
        folder / "adapter_model.safetensors",
        dict(metadata or {"format": "pt"}),
    )
    return folder
