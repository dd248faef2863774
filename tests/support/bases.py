"""A tiny base model for the good adapter, with weights of zeros."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
LAYER = {
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.o_proj.weight": (16, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
    "input_layernorm.weight": (16,),
}
TENSORS: Mapping[str, Sequence[int]] = {
    "model.embed_tokens.weight": (32, 16),
    **{f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in LAYER.items()},
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
}
"""The shapes of a Llama with two layers and a hidden size of 16."""


LLAMA_SIZES: Mapping[str, int] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
"""The fields of a Llama's config that decide the sizes of the layers."""


def tiny_base(
    folder: Path,
    *,
    dtype: str = "float32",
    dtypes: Mapping[str, str] | None = None,
    tensors: Mapping[str, Sequence[int] | None] | None = None,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write a base into a new folder.

    Args:
    folder: the new folder.
    dtype: the dtype of all tensors that ``dtypes`` does not name.
    dtypes: another dtype for each tensor whose name contains the key.
    tensors: shapes of tensors to add or change; None leaves the tensor out.
    config: the content of ``config.json``; the default holds only the model type.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    shapes = {**TENSORS, **(tensors or {})}
    kinds = {
        name: next((kind for part, kind in (dtypes or {}).items() if part in name), dtype)
        for name in shapes
    }
    arrays = {
        name: np.zeros(shape, DTYPES[kinds[name]])
        for name, shape in shapes.items()
        if shape is not None
    }
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder
