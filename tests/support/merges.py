"""Make tiny bases with random values, merge adapters into these, compute expected tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bases import tiny_base
from exact import exact_delta
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vera_convert.base.facts import BaseOptions
from vera_convert.delta import merged
from vera_convert.merging.merge import Merge, merge
from vera_convert.merging.options import MergeOptions

Tensors = dict[str, NDArray[Any]]
FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
INDEX = "model.safetensors.index.json"


def filled_base(folder: Path, *, shards: int = 1, **changes: Any) -> Path:
    """Write `bases.tiny_base` with random values, in one file or in shards with an index.

    If the config ties the head to the embedding, the head has the embedding's values.
    """
    single = tiny_base(folder, **changes) / "model.safetensors"
    values = np.random.default_rng(1)
    tensors = {
        name: zeros + values.normal(0, 0.1, zeros.shape).astype(zeros.dtype)
        for name, zeros in load_file(single).items()
    }
    if changes.get("config", {}).get("tie_word_embeddings") and "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    single.unlink()
    if shards == 1:
        save_file(tensors, single, {"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {
        name: f"model-{1 + position * shards // len(names):05}-of-{shards:05}.safetensors"
        for position, name in enumerate(names)
    }
    for file in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def merged_with(adapter: Path, base: Path, out: Path, **options: Any) -> Merge:
    """Merge an adapter into a base; keywords are the options of the merge and of the base."""
    key_map = options.pop("key_map", ())
    base_options = BaseOptions(str(base), key_map=key_map, dtype=options.pop("base_dtype", None))
    return merge(adapter, out, base=base_options, options=MergeOptions(**options))


def tensors_of(folder: Path) -> Tensors:
    """Return every tensor of a model, as the safetensors library reads the files."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def exact_change(adapter: Path, module: str, inputs: int) -> NDArray[Any]:
    """Return the delta of one layer in float64, for an adapter with stored projections."""
    stored = load_file(adapter / "adapter_model.safetensors")
    d, b = (stored[f"base_model.model.{module}.vera_lambda_{kind}"] for kind in "db")
    return exact_delta(stored["base_model.vera_A"], stored["base_model.vera_B"], d, b, inputs)


def expected_tensors(adapters: Mapping[Path, float], base: Path) -> Tensors:
    """Return the expected tensors, for adapters whose layers have the base's names."""
    found = tensors_of(base)
    for name, weight in found.items():
        module = name.removesuffix(".weight")
        changes = [
            factor * exact_change(adapter, module, weight.shape[1])
            for adapter, factor in adapters.items()
            if f"base_model.model.{module}.vera_lambda_b"
            in load_file(adapter / "adapter_model.safetensors")
        ]
        if changes:
            found[name] = merged(weight, sum(changes[1:], changes[0]))
    return found


def assert_same(found: Tensors, expected: Tensors, *, within: float = 3e-7) -> None:
    """Compare names, dtypes, shapes and values;

    `within` is relative to each tensor's largest value.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        apart = np.abs(found[name].astype(np.float64) - tensor.astype(np.float64))
        largest = np.abs(tensor.astype(np.float64)).max(initial=1)
        assert apart.max(initial=0) <= within * largest, name
