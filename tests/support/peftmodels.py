"""Wrap the same model with PEFT and with this package, and save both; needs torch and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import torchmodels
from torchmodels import KINDS

from vera_convert.with_torch import VeraConfig, VeraModel


def wrapped_twice(kind: str, dtype: str = "float32", **fields: Any) -> tuple[Any, VeraModel]:
    """Wrap two copies of a model, one with PEFT and one with this package, from the same seed."""
    fields = {"r": 4, "init_weights": False, **KINDS[kind].config, **fields}
    torch.manual_seed(2)
    theirs = peft.get_peft_model(torchmodels.built(kind, dtype), peft.VeraConfig(**fields))
    torch.manual_seed(2)
    config = VeraConfig(**fields, peft_version=peft.__version__)
    ours = VeraModel(torchmodels.built(kind, dtype), config)
    return theirs.eval(), ours


def saved(theirs: Any, ours: VeraModel, folder: Path) -> tuple[Path, Path]:
    theirs.save_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours")
    return folder / "theirs", folder / "ours"


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def config_of(folder: Path) -> Mapping[str, Any]:
    """Return a saved config with sorted lists, because PEFT writes sets in any order."""
    document = json.loads((folder / "adapter_config.json").read_bytes())
    return {
        name: sorted(value) if isinstance(value, list) else value
        for name, value in document.items()
    }
