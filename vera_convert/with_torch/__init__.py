"""VeRA in torch: a layer and a model that train, save and load PEFT's format.

    model = VeraModel(base, VeraConfig(r=64, target_modules=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW(model.trainable_parameters())
    ...
    model.save_pretrained("adapter")
    model = VeraModel.from_pretrained(base, "adapter")

No other folder of the package imports torch.

May import the ground and every folder but `formats` and `validation`.
"""

from __future__ import annotations

from vera_convert.adapter.config import VeraConfig
from vera_convert.errors import SurroundingsError

LOWEST_TORCH = (2, 4)
"""The oldest PyTorch of the tests."""

try:
    import torch
except ImportError as error:
    raise SurroundingsError(
        f"PyTorch cannot be imported here ({error}). Install PyTorch with "
        "`pip install 'vera-convert[torch]'`."
    ) from error

if tuple(int(number) for number in torch.__version__.split(".")[:2]) < LOWEST_TORCH:
    raise SurroundingsError(
        f"PyTorch {torch.__version__} is installed, and vera-convert needs PyTorch 2.4 or later. "
        "Install a later PyTorch with `pip install 'vera-convert[torch]'`."
    )

from vera_convert.with_torch.layer import SharedMatrix, VeraLinear  # noqa: E402
from vera_convert.with_torch.model import VeraModel  # noqa: E402

__all__ = ["SharedMatrix", "VeraConfig", "VeraLinear", "VeraModel"]
