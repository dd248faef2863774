"""Adapters and bases with a classifier, or with an output head tied to the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from adapters import good_adapter

PREFIX = "base_model.model."
HEAD = {"score.weight": (3, 16)}


def head(value: float, *, rows: int = 3) -> dict[str, Any]:
    return {f"{PREFIX}score.weight": np.full((rows, 16), value, np.float32)}


def on_the_head(folder: Path, **more: Any) -> Path:
    values = np.random.default_rng(2)
    tensors = {
        f"{PREFIX}lm_head.vera_lambda_b": values.normal(size=32).astype(np.float32),
        f"{PREFIX}lm_head.vera_lambda_d": values.normal(size=4).astype(np.float32),
        "base_model.vera_B": values.normal(size=(32, 4)).astype(np.float32),
    }
    return good_adapter(
        folder, tensors=tensors | more, target_modules=["q_proj", "v_proj", "lm_head"]
    )


TIED = {"model_type": "llama", "tie_word_embeddings": True, "text_config": {"x": 1}}
