"""Find errors in the values of an adapter's tensors, and signs of damage or missing training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vera_convert import rules
from vera_convert.adapter.adapter import AdaptedLayer, Adapter
from vera_convert.dtypes import PRECISION
from vera_convert.errors import refuse
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorFile
from vera_convert.files.value_range import ValueRange, value_ranges
from vera_convert.rules import Finding
from vera_convert.text import printable

LARGEST = 1e6
"""Trained vectors reach tens at most, and drawn matrices one."""
LEAST = 1e-12
"""The smallest plausible largest value of a trained or drawn tensor, if the dtype holds it."""

_SHARED = re.compile(r"(?:.*\.)?vera_[AB](?:\.[^.]+)?")


def value_errors(file: TensorFile, found: Mapping[str, ValueRange]) -> Iterator[Finding]:
    """Yield a finding for each tensor with NaN or infinity, and for a constant A or B.

    Args:
        file: the adapter's weights.
        found: the ranges of values of the tensors, by name.
    """
    for name, extent in found.items():
        if extent.not_finite is not None:
            yield rules.VALUE_NOT_FINITE.in_tensor(name, _where(file, name, extent.not_finite))
    for name, extent in found.items():
        # Any name of A or B counts, because a repaired adapter is checked here too.
        is_shared = _SHARED.fullmatch(name) is not None
        if is_shared and extent.is_constant and file.header.tensors[name].shape != (1, 1):
            reason = f"all its values are the same, of magnitude {extent.magnitude:.3g}."
            yield rules.PROJECTION_CONSTANT.in_tensor(name, reason)


def _where(file: TensorFile, name: str, place: int) -> str:
    info = file.header.tensors[name]
    dtype = NUMPY_DTYPE[info.dtype]
    start = file.header.data_start + info.start + place * dtype.itemsize
    value = np.frombuffer(file.source.read_at(start, dtype.itemsize), dtype)[0]
    index = [int(at) for at in np.unravel_index(place, info.shape)]
    return f"its value at {index} is {float(value)}."


def absurd_values(file: TensorFile, found: Mapping[str, ValueRange]) -> Iterator[Finding]:
    """Yield a warning for each tensor whose values no training gives.

    Args:
        file: the adapter's weights.
        found: the ranges of values of the tensors, by name.
    """
    for name, extent in found.items():
        magnitude = extent.magnitude
        smallest = 2.0 ** PRECISION[file.header.tensors[name].dtype].lowest
        least = max(LEAST, smallest) if ".vera_" in name else 0.0
        if magnitude > LARGEST or 0 < magnitude < least:
            yield rules.VALUE_ABSURD.in_tensor(name, f"its largest value is {magnitude:.3g}.")


def untrained_layers(
    layers: Sequence[AdaptedLayer], found: Mapping[str, ValueRange], *, starts_at_one: bool
) -> Iterator[Finding]:
    """Yield a warning if the vectors of all layers are untrained, and a note for some layers.

    Args:
        layers: the layers without errors, at least one.
        found: the ranges of values of the tensors, by name.
        starts_at_one: whether lambda_b is one before training.
    """
    b = [found[layer.lambda_b.name] for layer in layers]
    d = [found[layer.lambda_d.name] for layer in layers]
    if starts_at_one and all(each.is_constant and each.magnitude == 1 for each in b):
        reason = "every lambda_b is one, as before training if init_weights is false."
        yield rules.UNTRAINED.in_file(WEIGHTS_NAME, reason)
    for vector, vectors in (("lambda_b", b), ("lambda_d", d)):
        zero = [layer for layer, each in zip(layers, vectors, strict=True) if not each.magnitude]
        if len(zero) == len(layers):
            yield rules.UNTRAINED.in_file(WEIGHTS_NAME, f"every {vector} is zero.")
        elif zero:
            example = printable(zero[0].module)
            reason = f"{vector} is zero in {len(zero)} of {len(layers)} layers, such as {example}."
            yield rules.LAYERS_UNTRAINED.in_file(WEIGHTS_NAME, reason)


def refuse_values(adapter: Adapter) -> dict[str, ValueRange]:
    """Return the ranges of an adapter's values, or raise `CheckpointError` with every error."""
    found = value_ranges(adapter.file)
    refuse(value_errors(adapter.file, found))
    return found
