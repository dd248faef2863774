"""A conversion to LoRA holds a few factors in memory, for any number of layers."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vera_convert.lora.conversion import to_lora
from vera_convert.lora.options import LoraOptions

HIDDEN, RANK = 512, 64
FACTOR = HIDDEN * RANK * 4
"""The bytes of a factor in float32."""


def written(folder: Path, layers: int) -> tuple[Path, Path]:
    """Write an adapter, and the config of its base, a Llama."""
    values = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{target}.vera_lambda_{kind}": (
            values.normal(size=size).astype(np.float32)
        )
        for layer in range(layers)
        for target in ("q_proj", "v_proj")
        for kind, size in (("b", HIDDEN), ("d", RANK))
    }
    tensors["base_model.vera_A"] = values.normal(size=(RANK, HIDDEN)).astype(np.float32)
    tensors["base_model.vera_B"] = values.normal(size=(HIDDEN, RANK)).astype(np.float32)
    adapter, base = folder / "adapter", folder / "base"
    for each in (adapter, base):
        each.mkdir(parents=True)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "VERA",
        "r": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "save_projection": True,
        "projection_prng_key": 0,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": 64,
    }
    (base / "config.json").write_text(json.dumps(model))
    return adapter, base


def peak(folder: Path, layers: int, options: LoraOptions) -> int:
    """Return the most bytes that a conversion holds at a time."""
    adapter, base = written(folder, layers)
    tracemalloc.start()
    try:
        to_lora(adapter, folder / "out", base=base, options=options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rank", [None, 48], ids=["exact", "lower"])
def test_memory_does_not_grow_with_the_number_of_layers(rank: int | None, tmp_path: Path) -> None:
    options = LoraOptions(rank=rank)
    peak(tmp_path / "first", 1, options)  # the first run also imports modules and fills caches
    few, many = (peak(tmp_path / str(layers), layers, options) for layers in (2, 22))
    assert many - few < 20 * 2 * FACTOR / 4
