"""Check the values of an adapter's tensors for signs of damage or of missing training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.adapter.tensors import AdaptedLayer
from vera_convert.adapter.values import value_errors
from vera_convert.dtypes import PRECISION
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorFile
from vera_convert.files.value_range import ValueRange
from vera_convert.rules import (
    LAYERS_UNTRAINED,
    PRODUCT_OVERFLOWS,
    UNTRAINED,
    VALUE_ABSURD,
    Finding,
)
from vera_convert.text import printable

LARGEST = 1e6
"""Trained vectors reach tens at most, and drawn matrices one."""
LEAST = 1e-12
LARGEST_FLOAT16 = 65504.0


def value_findings(
    file: TensorFile,
    config: VeraConfig | None,
    layers: Sequence[AdaptedLayer],
    found: Mapping[str, ValueRange],
    *,
    on_float16: bool,
) -> Iterator[Finding]:
    """Yield findings for wrong values, and for signs of missing training.

    Args:
        file: the adapter's weights.
        config: the config; None if unreadable.
        layers: the layers without errors.
        found: the value ranges of the file's tensors.
        on_float16: whether the base is loaded in float16.
    """
    errors = [*value_errors(file, found)]
    yield from errors
    yield from _absurd(file, found)
    sound = [
        layer for layer in layers if {layer.lambda_b.name, layer.lambda_d.name} <= found.keys()
    ]
    if not errors and sound:
        yield from _untrained(
            sound, found, starts_at_one=config is not None and not config.init_weights
        )
        yield from _overflow(sound, found, on_float16=on_float16)


def _absurd(file: TensorFile, found: Mapping[str, ValueRange]) -> Iterator[Finding]:
    for name, extent in found.items():
        magnitude = extent.magnitude
        least = _least(file.header.tensors[name].dtype) if ".vera_" in name else 0.0
        if magnitude > LARGEST or 0 < magnitude < least:
            yield VALUE_ABSURD.in_tensor(name, f"its largest value is {magnitude:.3g}.")


def _least(dtype: str) -> float:
    """Return the smallest plausible largest value of a trained or drawn tensor."""
    return max(LEAST, 2.0 ** PRECISION[dtype].lowest)


def _untrained(
    layers: Sequence[AdaptedLayer], found: Mapping[str, ValueRange], *, starts_at_one: bool
) -> Iterator[Finding]:
    """Yield a warning if the vectors of all layers are untrained, and a note for some layers."""
    b = [found[layer.lambda_b.name] for layer in layers]
    d = [found[layer.lambda_d.name] for layer in layers]
    if starts_at_one and all(each.is_constant and each.magnitude == 1 for each in b):
        reason = "every lambda_b is one, as before training where init_weights is false."
        yield UNTRAINED.in_file(WEIGHTS_NAME, reason)
    for vector, vectors in (("lambda_b", b), ("lambda_d", d)):
        zero = [layer for layer, each in zip(layers, vectors, strict=True) if not each.magnitude]
        if len(zero) == len(layers):
            yield UNTRAINED.in_file(WEIGHTS_NAME, f"every {vector} is zero.")
        elif zero:
            example = printable(zero[0].module)
            reason = f"{vector} is zero in {len(zero)} of {len(layers)} layers, such as {example}."
            yield LAYERS_UNTRAINED.in_file(WEIGHTS_NAME, reason)


def _overflow(
    layers: Sequence[AdaptedLayer], found: Mapping[str, ValueRange], *, on_float16: bool
) -> Iterator[Finding]:
    """Yield a warning if the vectors can take a product in float16 beyond its range.

    Stored A and B give the bound; drawn A and B are bounded by one.
    """
    A = found[A_NAME].magnitude if A_NAME in found else 1.0
    B = found[B_NAME].magnitude if B_NAME in found else 1.0
    for layer in layers:
        if not on_float16 and {layer.lambda_b.dtype, layer.lambda_d.dtype} != {"F16"}:
            continue
        b, d = (found[tensor.name].magnitude for tensor in (layer.lambda_b, layer.lambda_d))
        rank = layer.lambda_d.shape[0]
        if max(d * A, b * B, rank * b * B * d * A) > LARGEST_FLOAT16:
            dtype = "the base is loaded in float16" if on_float16 else "both are in float16"
            reason = f"the largest of b is {b:.3g}, of d {d:.3g}; {dtype}."
            yield PRODUCT_OVERFLOWS.at(printable(layer.module), reason)
