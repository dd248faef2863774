"""Merge models wrongly on purpose, and list the findings of `verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from folders import weights
from merges import exact_change
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_convert.base.facts import BaseOptions
from vera_convert.delta import delta, merged
from vera_convert.draws.generator import Draw, Variant
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import Verification, verify

Array = NDArray[Any]
Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
PROVENANCE = "merge-provenance.json"


def layers(adapter: Path, base: Path, model: Path, **options: Any) -> Verification:
    """Verify the weights of a merged model."""
    base_options = BaseOptions(str(base), key_map=options.pop("key_map", ()))
    chosen = VerifyOptions(layers_only=True, **options)
    return verify(adapter, base=base_options, merged=model, options=chosen)


def codes(result: Verification) -> list[str]:
    """Return the codes of all findings, in order."""
    return [finding.code for finding in result.findings]


def edit(model: Path, new: Mapping[str, Array | None]) -> None:
    """Replace tensors in the one weight file of a model; None removes the tensor."""
    path = model / "model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors: dict[str, Array | None] = {**load_file(path), **new}
    path.unlink()
    save_file({name: array for name, array in tensors.items() if array is not None}, path, metadata)


def rewrite(model: Path, exact_change: Callable[[Any], Any]) -> None:
    """Change the provenance of a merged model."""
    path = model / PROVENANCE
    document = json.loads(path.read_bytes())
    found = exact_change(document)
    path.write_text(json.dumps(document if found is None else found))


# --- wrong merges of one layer -------------------------------------------------------------------


def _projections(adapter: Path) -> tuple[Array, Array]:
    stored = weights(adapter)
    return stored["base_model.vera_A"], stored["base_model.vera_B"]


def _vectors(adapter: Path, module: str) -> tuple[Array, Array]:
    stored = weights(adapter)
    d, b = (stored[f"base_model.model.{module}.vera_lambda_{kind}"] for kind in "db")
    return d, b


def left_out(_: Path, __: str, weight: Array) -> Array:
    return weight


def twice(adapter: Path, module: str, weight: Array) -> Array:
    added = exact_change(adapter, module, weight.shape[1])
    return merged(merged(weight, added), added)


def subtracted(adapter: Path, module: str, weight: Array) -> Array:
    return merged(weight, -exact_change(adapter, module, weight.shape[1]))


def transposed(adapter: Path, module: str, weight: Array) -> Array:
    return merged(weight, exact_change(adapter, module, weight.shape[1]).T)


def wrong_slice(adapter: Path, module: str, weight: Array) -> Array:
    """Use the last columns of A and the last rows of B; rotate both if there are no others."""
    (A, B), (d, b) = _projections(adapter), _vectors(adapter, module)
    return merged(weight, delta(np.roll(A, 1, 1), np.roll(B, -1, 0), d, b, weight.shape[1]))


def wrong_key(adapter: Path, module: str, weight: Array) -> Array:
    (A, B), (d, b) = _projections(adapter), _vectors(adapter, module)
    A, B = Draw(
        Variant.FLOAT32_FUSED, key=8, rank=len(A), in_features=A.shape[1], out_features=len(B)
    ).matrices()
    return merged(weight, delta(A, B, d, b, weight.shape[1]))


def other_layer(adapter: Path, module: str, weight: Array) -> Array:
    return merged(weight, exact_change(adapter, module.replace(".0.", ".1."), weight.shape[1]))


def rounded_twice(adapter: Path, module: str, weight: Array) -> Array:
    """Round the delta to 16 bits before the addition, as a 16-bit model does."""
    narrow = weight.dtype if weight.dtype.itemsize == 2 else np.dtype(ml_dtypes.bfloat16)
    added = exact_change(adapter, module, weight.shape[1]).astype(narrow)
    return merged(weight, added.astype(np.float32))


def one_value(adapter: Path, module: str, weight: Array) -> Array:
    """Change one value of a correct merge by two last bits."""
    found = merged(weight, exact_change(adapter, module, weight.shape[1]))
    flat = found.reshape(-1).view(f"u{found.dtype.itemsize}")
    flat[5] += 2 if found.dtype.itemsize == 2 else 1 << 8
    return found


WRONG: Mapping[str, tuple[Callable[[Path, str, Array], Array], str]] = {
    "left out": (left_out, "the delta was not added"),
    "twice": (twice, "added twice"),
    "subtracted": (subtracted, "as if the base and the merged model were exchanged"),
    "transposed": (transposed, "added transposed"),
    "wrong slice": (wrong_slice, "Another matrix"),
    "wrong key": (wrong_key, "Another matrix"),
    "other layer": (other_layer, "other vectors was added: the vectors of another layer"),
    "rounded twice": (rounded_twice, ""),
    "one value": (one_value, ""),
}
"""Ways to merge one layer wrongly, each with the explanation of `verify`."""
