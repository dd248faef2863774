"""VeRA in torch: a layer and a model that train, save and load PEFT's format.

    model = VeraModel(base, VeraConfig(r=64, target_modules=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    ...
    model.save_pretrained("adapter")
    model = VeraModel.from_pretrained(base, "adapter")

This folder is the only part of the package that imports torch.
"""

from __future__ import annotations

from vera_convert.adapter.config import VeraConfig
from vera_convert.errors import SurroundingsError

try:
    import torch  # noqa: F401 -- to say in our words that it is missing
except ImportError as error:
    raise SurroundingsError(
        "vera_convert.with_torch needs PyTorch, which cannot be imported here "
        f"({error}). Install it with: pip install 'vera-convert[torch]'"
    ) from error

from vera_convert.with_torch.layer import SharedMatrix, VeraLinear
from vera_convert.with_torch.model import VeraModel

__all__ = ["SharedMatrix", "VeraConfig", "VeraLinear", "VeraModel"]
