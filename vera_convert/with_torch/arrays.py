"""Tensors of torch as arrays of NumPy and back, bit for bit, 16-bit and 8-bit floats included."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vera_convert.files.tensorfile import NUMPY_DTYPE

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The dtypes that both have: torch's name, safetensors' name."""
_NUMPY = {getattr(torch, name): NUMPY_DTYPE[short] for name, short in _NAMES.items()}
_TORCH = {dtype: kind for kind, dtype in _NUMPY.items()}


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's values as an array; one on the CPU shares its memory if it can."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    array: NDArray[Any] = raw.view(_NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))
    return array


def to_tensor(array: NDArray[Any]) -> Tensor:
    """Return an array's values as a tensor on the CPU, which shares the array's memory."""
    raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return raw.view(_TORCH[array.dtype]).reshape(array.shape)
