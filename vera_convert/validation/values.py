"""What the values of an adapter's tensors say: that it was not trained, or was damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.adapter.tensors import WEIGHTS_NAME, AdaptedLayer
from vera_convert.adapter.values import value_errors
from vera_convert.dtypes import PRECISION
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
"""Trained vectors come to tens at most, drawn matrices to one."""
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
    """Yield what is wrong with values, and what they say of the training.

    Args:
        file: the adapter's weights.
        config: its config, if it can be read.
        layers: its layers, as far as they are sound.
        found: the value_ranges of the file's tensors.
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
    """Return the magnitude that the values of trained and of drawn tensors do not stay below."""
    return max(LEAST, 2.0 ** PRECISION[dtype].lowest)


def _untrained(
    layers: Sequence[AdaptedLayer], found: Mapping[str, ValueRange], *, starts_at_one: bool
) -> Iterator[Finding]:
    """Yield a finding where vectors are as they began: in all layers a warning, in some a note."""
    b = [found[layer.lambda_b.name] for layer in layers]
    d = [found[layer.lambda_d.name] for layer in layers]
    if starts_at_one and all(each.is_constant and each.magnitude == 1 for each in b):
        reason = "every lambda_b is one, as before training where init_weights is false."
        yield UNTRAINED.in_file(WEIGHTS_NAME, reason)
    for what, vectors in (("lambda_b", b), ("lambda_d", d)):
        zero = [layer for layer, each in zip(layers, vectors, strict=True) if not each.magnitude]
        if len(zero) == len(layers):
            yield UNTRAINED.in_file(WEIGHTS_NAME, f"every {what} is zero.")
        elif zero:
            example = printable(zero[0].module)
            reason = f"{what} is, in {len(zero)} of {len(layers)}, such as {example}."
            yield LAYERS_UNTRAINED.in_file(WEIGHTS_NAME, reason)


def _overflow(
    layers: Sequence[AdaptedLayer], found: Mapping[str, ValueRange], *, on_float16: bool
) -> Iterator[Finding]:
    """Warn where the vectors take a product in float16 beyond its range.

    A and B are bounded by what is stored or, where they are drawn, by one.
    """
    A = found[A_NAME].magnitude if A_NAME in found else 1.0
    B = found[B_NAME].magnitude if B_NAME in found else 1.0
    for layer in layers:
        if not on_float16 and {layer.lambda_b.dtype, layer.lambda_d.dtype} != {"F16"}:
            continue
        b, d = (found[tensor.name].magnitude for tensor in (layer.lambda_b, layer.lambda_d))
        rank = layer.lambda_d.shape[0]
        if max(d * A, b * B, rank * b * B * d * A) > LARGEST_FLOAT16:
            what = "the base is loaded in float16" if on_float16 else "both are float16"
            reason = f"the largest of b is {b:.3g}, of d {d:.3g}; {what}."
            yield PRODUCT_OVERFLOWS.at(printable(layer.module), reason)
