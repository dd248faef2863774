"""A base with fp8 weights and scales, and the dequantized values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bases import TENSORS
from numpy.typing import NDArray

from vera_convert.files.tensorfile import from_array, write_tensors

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F32, E5M2 = np.dtype(np.float32), np.dtype(ml_dtypes.float8_e5m2)
Arrays = dict[str, NDArray[Any]]
SUFFIX = "proj.weight"
CONFIG: Mapping[str, object] = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [6, 5]},
    "hidden_size": 16,
}
FORMS = {"block": (6, 5), "default": (128, 128), "channel": (1, None), "tensor": (None, None)}


def fp8_base(
    folder: Path,
    *,
    form: str = "block",
    dtype: np.dtype[Any] = F8,
    only: str = SUFFIX,
    scale_name: str = "weight_scale_inv",
    scale_dtype: np.dtype[Any] = F32,
    shards: int = 1,
    change: Mapping[str, NDArray[Any] | None] | None = None,
    config: Mapping[str, object] = CONFIG,
) -> Arrays:
    """Write a Llama whose weights that end in `only` are fp8; return all weights in float32."""
    values = np.random.default_rng(0)
    stored: Arrays = {}
    values_of: Arrays = {}
    for name, shape in TENSORS.items():
        array = values.normal(size=shape).astype(np.float32)
        if not name.endswith(only):
            stored[name] = array.astype(BF16)
            values_of[name] = stored[name].astype(np.float32)
            continue
        stored[name] = array.astype(dtype)
        rows, columns = (size or whole for size, whole in zip(FORMS[form], shape, strict=True))
        blocks = -(-shape[0] // rows), -(-shape[1] // columns)
        scales = values.uniform(0.5, 2, size=blocks).astype(scale_dtype)
        every = np.repeat(np.repeat(scales.astype(np.float32), rows, 0), columns, 1)
        values_of[name] = stored[name].astype(np.float32) * every[: shape[0], : shape[1]]
        scale = scales.reshape(1) if form == "tensor" else scales
        stored[name.removesuffix("weight") + scale_name] = scale
    for name, changed in (change or {}).items():
        stored.pop(name, None)
        if changed is not None:
            stored[name] = changed
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(stored)
    parts = [names[part::shards] for part in range(shards)]
    files = {f"model-{n:05}-of-{shards:05}.safetensors": part for n, part in enumerate(parts, 1)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, part in files.items() for name in part}
        size = sum(array.nbytes for array in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in files.items():
        write_tensors(folder / file, [from_array(n, stored[n]) for n in part], {"format": "pt"})
    return values_of
