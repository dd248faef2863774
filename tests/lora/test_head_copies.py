"""An adapted output head: PEFT stores a copy of the base's weight; engines use their own head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import RANK, good_adapter
from bases import tiny_base
from folders import CONFIG_NAME, WEIGHTS, weights
from safetensors.numpy import load_file, save_file

from vera_convert import LoraOptions, VerifyOptions, to_lora, verify
from vera_convert.errors import CheckpointError
from vera_convert.lora.engines import EngineName

PREFIX = "base_model.model."
COPY = f"{PREFIX}lm_head.base_layer.weight"
NAME = {"mlx": "adapters.safetensors"}


def on_the_head(folder: Path, copy: Any) -> Path:
    """Write an adapter of q, v and the head, with the copy that PEFT stores."""
    values = np.random.default_rng(1)
    rows = len(copy)
    tensors = {
        "base_model.vera_B": values.random((rows, RANK), np.float32),
        f"{PREFIX}lm_head.vera_lambda_b": values.normal(size=rows).astype(np.float32),
        f"{PREFIX}lm_head.vera_lambda_d": values.normal(size=RANK).astype(np.float32),
        COPY: copy,
    }
    return good_adapter(folder, tensors=tensors, target_modules=["q_proj", "v_proj", "lm_head"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write a base whose head has random values."""
    config = {"model_type": "llama", "tie_word_embeddings": False}
    folder = tiny_base(tmp_path / "base", config=config)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = np.random.default_rng(2).random((32, 16), np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def head_of(base: Path) -> Any:
    return load_file(base / "model.safetensors")["lm_head.weight"]


def are_same(adapter: Path, lora: Path, base: Path) -> bool:
    """Say whether `verify` passes a LoRA by the files alone."""
    return verify(adapter, lora=lora, base=base, options=VerifyOptions(layers_only=True)).passed


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi", "mlx"])
def test_an_engine_with_the_base_s_own_head_needs_no_copy(
    engine: Any, base: Path, tmp_path: Path
) -> None:
    adapter = on_the_head(tmp_path / "adapter", head_of(base))
    done = to_lora(adapter, tmp_path / "out", base=base, options=LoraOptions(engine=engine))
    assert "lm_head" in done.names
    found = load_file(tmp_path / "out" / NAME.get(engine, WEIGHTS))
    assert not [name for name in found if "base_layer" in name]
    assert [name for name in found if "lm_head" in name]
    assert done.extras.tensors == ()
    assert are_same(adapter, tmp_path / "out", base)


def test_peft_keeps_the_copy_and_no_bias_is_declared(base: Path, tmp_path: Path) -> None:
    adapter = on_the_head(tmp_path / "adapter", head_of(base) + np.float32(1))
    done = to_lora(adapter, tmp_path / "out", base=base)
    assert np.array_equal(weights(tmp_path / "out")[COPY], head_of(base) + np.float32(1))
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes())["bias"] == "none"
    assert not [each for each in done.findings if each.code > "V7"]
    assert are_same(adapter, tmp_path / "out", base)
    stored = weights(tmp_path / "out")
    del stored[COPY]
    with_record = (tmp_path / "out" / WEIGHTS).read_bytes()
    size = int.from_bytes(with_record[:8], "little")
    metadata = json.loads(with_record[8 : 8 + size])["__metadata__"]
    save_file(stored, tmp_path / "out" / WEIGHTS, metadata)
    assert not are_same(adapter, tmp_path / "out", base)


@pytest.mark.parametrize(
    ("rows", "reason"), [(32, "the stored values differ"), (36, "the vocabulary was resized")]
)
def test_a_stored_head_that_the_engine_would_not_use_is_refused(
    rows: int, reason: str, base: Path, tmp_path: Path
) -> None:
    copy = np.resize(head_of(base), (rows, 16)) + np.float32(rows == 32)
    adapter = on_the_head(tmp_path / "adapter", copy)
    with pytest.raises(CheckpointError, match=rf"V535 .*{reason}"):
        to_lora(adapter, tmp_path / "out", base=base, options=LoraOptions(engine=EngineName.VLLM))
    assert not (tmp_path / "out").exists()


def test_a_stored_embedding_is_refused_and_not_declared_as_a_bias(
    base: Path, tmp_path: Path
) -> None:
    rows = {f"{PREFIX}model.embed_tokens.weight": np.ones((32, 16), np.float32)}
    adapter = good_adapter(tmp_path / "adapter", tensors=rows)
    with pytest.raises(CheckpointError, match=r"V702 model\.embed_tokens: .*stores whole"):
        to_lora(adapter, tmp_path / "out", base=base, options=LoraOptions(engine=EngineName.VLLM))
    to_lora(adapter, tmp_path / "peft", base=base)
    assert json.loads((tmp_path / "peft" / CONFIG_NAME).read_bytes())["bias"] == "none"
