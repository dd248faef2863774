"""Compare the factors of layers of several sizes value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from bases import LAYER, tiny_base
from numpy.typing import NDArray
from safetensors.numpy import load_file

from vera_convert.lora.conversion import to_lora
from vera_convert.lora.factors import Factors, balancing_powers
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.stored import rounded_once

SHAPES = {
    f"model.layers.{n}.{name.removesuffix('.weight')}": shape
    for n in range(2)
    for name, shape in LAYER.items()
    if len(shape) == 2
}
"""Outputs and inputs of each linear layer, narrower and wider, in any order."""
PREFIX = "base_model.model."
HEADS = {"q_proj": 2, "k_proj": 1}
MODEL = {
    "model_type": "llama",
    "num_attention_heads": HEADS["q_proj"],
    "num_key_value_heads": HEADS["k_proj"],
    "num_hidden_layers": 2,
}


def written(
    folder: Path, rank: int, *, untrained: str = "", **options: Any
) -> tuple[dict[str, Factors], dict[str, NDArray[Any]]]:
    """Convert an adapter of all linear layers; return the operands and the tensors of the LoRA.

    The layers whose names contain `untrained` have a b of 0.
    """
    values = np.random.default_rng(rank)
    most = [max(shape[side] for shape in SHAPES.values()) for side in range(2)]
    A, B = (values.normal(size=s).astype(np.float32) for s in ((rank, most[1]), (most[0], rank)))
    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    tensors |= {"base_model.vera_A": A, "base_model.vera_B": B}
    layers = {}
    for module, (out, width) in SHAPES.items():
        b, d = (values.normal(size=size).astype(np.float32) for size in (out, rank))
        b *= module != untrained
        tensors |= {f"{PREFIX}{module}.vera_lambda_b": b, f"{PREFIX}{module}.vera_lambda_d": d}
        layers[module] = Factors(A[:, :width], B[:out], d, b)
    targets = sorted({module.rpartition(".")[2] for module in SHAPES})
    adapter = good_adapter(folder / "vera", tensors=tensors, r=rank, target_modules=targets)
    base = tiny_base(folder / "base", config=MODEL)
    done = to_lora(adapter, folder / "lora", base=base, options=LoraOptions(check=True, **options))
    assert done.plan.rank == rank
    files = [*(folder / "lora").glob("*.safetensors")]
    return layers, load_file(files[0]) if files else {}


@pytest.mark.parametrize("rank", [3, 12, 20, 40])
@pytest.mark.parametrize(("name", "dtype"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_each_layer_gets_its_own_part_of_a_and_b(
    name: str, dtype: str, rank: int, tmp_path: Path
) -> None:
    layers, found = written(tmp_path, rank, dtype=name)
    assert len(found) == 2 * len(layers)
    for module, own in layers.items():
        A, B, d, b = (each.astype(np.float64) for each in (own.A, own.B, own.d, own.b))
        lora_A, lora_B = (found[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        assert lora_A.tobytes() == rounded_once(A, dtype).tobytes(), module
        assert lora_B.tobytes() == rounded_once(B * d * b[:, None], dtype).tobytes(), module


def test_float16_is_balanced_for_each_layer_separately(tmp_path: Path) -> None:
    first = "model.layers.0.mlp.up_proj"
    layers, found = written(tmp_path, 12, untrained=first, dtype="float16")
    balanced = {module for module, own in layers.items() if balancing_powers(own).any()}
    assert balanced == {*layers} - {first}
    for module, own in layers.items():
        grown = 2.0 ** balancing_powers(own)
        lora_A, lora_B = (found[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        exact = own.A.astype(np.float64) * grown[:, None]
        assert lora_A.tobytes() == exact.astype(np.float16).tobytes(), module
        assert lora_B.tobytes() == (own.lora_B() / grown).astype(np.float16).tobytes(), module


def test_mlx_has_the_factors_of_every_layer_transposed(tmp_path: Path) -> None:
    layers, found = written(tmp_path, 12, engine="mlx")
    for module, own in layers.items():
        assert np.array_equal(found[f"{module}.lora_a"], own.A.T), module
        assert np.array_equal(found[f"{module}.lora_b"], own.lora_B().T.astype(np.float32)), module


def test_gguf_has_the_factors_with_the_rows_of_q_and_k_in_its_order(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    layers, _ = written(tmp_path, 12, engine="gguf")
    file = gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf")
    assert file.get_field("adapter.lora.alpha").contents() == 12
    found = {tensor.name: tensor.data for tensor in file.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert len(found) == 2 * len(layers)
    for module, own in layers.items():
        rows, heads = own.lora_B().astype(np.float32), HEADS.get(module.rpartition(".")[2], 0)
        if heads:
            rows = rows.reshape(heads, 2, -1, 12).swapaxes(1, 2).reshape(rows.shape)
        name = f"{names.get_name(module)}.weight.lora_"
        assert np.array_equal(found[f"{name}a"], own.A), module
        assert np.array_equal(found[f"{name}b"], rows), module
