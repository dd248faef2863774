"""What the values of an adapter's tensors say: that it was not trained, or was damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vera_convert.adapter.tensors import A_NAME, B_NAME, WEIGHTS_NAME, AdaptedLayer
from vera_convert.adapter.values import value_errors
from vera_convert.files.extents import Extent
from vera_convert.files.reading import printable
from vera_convert.files.tensorfile import TensorFile
from vera_convert.rules import (
    LAYERS_UNTRAINED,
    PRODUCT_OVERFLOWS,
    UNTRAINED,
    VALUE_ABSURD,
    Finding,
)

LARGEST = 1e6
"""Trained vectors come to tens at most, drawn matrices to one."""
LARGEST_FLOAT16 = 65504.0
_SMALLEST_NORMAL = {"F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14}


def value_findings(
    file: TensorFile, layers: Sequence[AdaptedLayer], found: Mapping[str, Extent]
) -> Iterator[Finding]:
    """Yield what is wrong with values, and what they say of the training.

    Args:
        file: the adapter's weights.
        layers: its layers, as far as they are sound.
        found: the extents of the file's tensors.
    """
    errors = [*value_errors(file, found)]
    yield from errors
    yield from _absurd(file, found)
    sound = [
        layer for layer in layers if {layer.lambda_b.name, layer.lambda_d.name} <= found.keys()
    ]
    if not errors:
        yield from _untrained(sound, found)
        yield from _overflow(sound, found)


def _absurd(file: TensorFile, found: Mapping[str, Extent]) -> Iterator[Finding]:
    for name, extent in found.items():
        magnitude = extent.magnitude
        if magnitude > LARGEST:
            yield VALUE_ABSURD.at(printable(name), f"its largest value is {magnitude:.3g}.")
        elif 0 < magnitude < _SMALLEST_NORMAL[file.header.tensors[name].dtype]:
            reason = f"all its values are below what its type holds in full, {magnitude:.3g}."
            yield VALUE_ABSURD.at(printable(name), reason)


def _untrained(layers: Sequence[AdaptedLayer], found: Mapping[str, Extent]) -> Iterator[Finding]:
    """Yield a finding where vectors are zero: in all layers a warning, in some a note."""
    zero_b = [layer for layer in layers if not found[layer.lambda_b.name].magnitude]
    zero_d = [layer for layer in layers if not found[layer.lambda_d.name].magnitude]
    for what, zero in (("lambda_b", zero_b), ("lambda_d", zero_d)):
        if layers and len(zero) == len(layers):
            yield UNTRAINED.at(WEIGHTS_NAME, f"every {what} is zero.")
            return
    if zero_b:
        reason = f"in {len(zero_b)} of {len(layers)}, such as {printable(zero_b[0].module)}."
        yield LAYERS_UNTRAINED.at(WEIGHTS_NAME, reason)


def _overflow(layers: Sequence[AdaptedLayer], found: Mapping[str, Extent]) -> Iterator[Finding]:
    """Warn where the vectors alone take a product of a float16 adapter beyond its range.

    A and B are bounded by what is stored or, where they are drawn, by one.
    """
    A = found[A_NAME].magnitude if A_NAME in found else 1.0
    B = found[B_NAME].magnitude if B_NAME in found else 1.0
    for layer in layers:
        if {layer.lambda_b.dtype, layer.lambda_d.dtype} != {"F16"}:
            continue
        b, d = (found[tensor.name].magnitude for tensor in (layer.lambda_b, layer.lambda_d))
        rank = layer.lambda_d.shape[0]
        if max(d * A, b * B, rank * b * B * d * A) > LARGEST_FLOAT16:
            reason = f"the largest of b is {b:.3g}, of d {d:.3g}; both are float16."
            yield PRODUCT_OVERFLOWS.at(printable(layer.module), reason)
