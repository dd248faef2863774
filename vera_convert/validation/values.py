"""Check the values of an adapter's tensors for signs of damage or of missing training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vera_convert import rules
from vera_convert.adapter.adapter import AdaptedLayer
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.adapter.values import absurd_values, untrained_layers, value_errors
from vera_convert.files.tensorfile import TensorFile
from vera_convert.files.value_range import ValueRange
from vera_convert.rules import Finding
from vera_convert.text import printable

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
    yield from absurd_values(file, found)
    sound = [
        layer for layer in layers if {layer.lambda_b.name, layer.lambda_d.name} <= found.keys()
    ]
    if not errors and sound:
        yield from untrained_layers(
            sound, found, starts_at_one=config is not None and not config.init_weights
        )
        yield from _overflow(sound, found, on_float16=on_float16)


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
            yield rules.PRODUCT_OVERFLOWS.at(printable(layer.module), reason)
