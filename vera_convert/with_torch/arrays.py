"""Convert torch tensors to NumPy arrays and back, bit for bit, with 16-bit and 8-bit floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vera_convert.dtypes import NAMES
from vera_convert.files.tensorfile import NUMPY_DTYPE

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    getattr(torch, NAMES[header]): dtype
    for header, dtype in NUMPY_DTYPE.items()
    if hasattr(torch, NAMES[header])
}
TORCH_DTYPE = {dtype: kind for kind, dtype in _NUMPY.items()}
"""torch's dtype, by NumPy's."""


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's values as an array; a contiguous CPU tensor shares the memory."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    array: NDArray[Any] = raw.view(_NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))
    return array


def to_tensor(array: NDArray[Any]) -> Tensor:
    """Return an array's values as a CPU tensor in the same memory."""
    raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return raw.view(TORCH_DTYPE[array.dtype]).reshape(array.shape)
