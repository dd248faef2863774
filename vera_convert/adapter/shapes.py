"""Check the shapes and the dtypes of an adapter's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vera_convert import rules
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.tensors import MAX_PROJECTION_BYTES, MAX_WIDTH, AdaptedLayer
from vera_convert.dtypes import FLOATS
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.tensorfile import TensorData
from vera_convert.rules import Finding
from vera_convert.text import printable


def shape_findings(
    layers: Mapping[str, AdaptedLayer],
    pair: Mapping[str, TensorData],
    others: Sequence[TensorData],
    config: VeraConfig,
) -> Iterator[Finding]:
    """Yield a finding for each tensor of a wrong shape or dtype.

    Args:
        layers: the adapted layers.
        pair: the stored A and B by the last element of the name.
        others: the tensors in place of the base's tensors.
        config: the adapter's config.
    """
    trained = [t for layer in layers.values() for t in (layer.lambda_b, layer.lambda_d)]
    for tensor in (*trained, *pair.values()):
        if tensor.dtype not in FLOATS:
            yield rules.TENSOR_DTYPE.in_tensor(tensor.name, f"it is of type {tensor.dtype}.")
    for tensor in others:
        # Other buffers, such as counters, can be whole numbers.
        if tensor.name.endswith((".weight", ".bias")) and tensor.dtype not in FLOATS:
            yield rules.TENSOR_DTYPE.in_tensor(tensor.name, f"it is of type {tensor.dtype}.")
    for tensor in (*trained, *pair.values(), *others):
        if 0 in tensor.shape:
            yield rules.EMPTY_TENSOR.in_tensor(tensor.name, f"its shape is {list(tensor.shape)}.")
    for layer in layers.values():
        yield from _lambda_shapes(layer, config.r)
    yield from _projection_shapes(pair, layers, config.r)
    kinds = {tensor.dtype for tensor in (*trained, *pair.values())}
    if len(kinds) > 1:
        yield rules.MIXED_DTYPES.in_file(WEIGHTS_NAME, f"they are {', '.join(sorted(kinds))}.")


def _lambda_shapes(layer: AdaptedLayer, rank: int) -> Iterator[Finding]:
    for tensor in (layer.lambda_b, layer.lambda_d):
        if len(tensor.shape) == 2 and tensor.shape[1] == 1:
            yield rules.LAMBDA_COLUMN.in_tensor(tensor.name, f"its shape is {list(tensor.shape)}.")
        elif len(tensor.shape) != 1:
            yield rules.LAMBDA_SHAPE.in_tensor(tensor.name, f"its shape is {list(tensor.shape)}.")
    found = layer.lambda_d.shape[0] if layer.lambda_d.shape else 1
    if 0 not in layer.lambda_d.shape and found != rank:
        yield rules.LAMBDA_D_LENGTH.in_tensor(
            layer.lambda_d.name, f"it has {found} values, but r is {rank}."
        )


def _projection_shapes(
    pair: Mapping[str, TensorData], layers: Mapping[str, AdaptedLayer], rank: int
) -> Iterator[Finding]:
    for name, axis in (("vera_A", 0), ("vera_B", 1)):
        tensor = pair.get(name)
        if tensor is None or 0 in tensor.shape:
            continue
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            expected = f"({rank}, inputs)" if axis == 0 else f"(outputs, {rank})"
            yield rules.PROJECTION_SHAPE.at(
                tensor.name, f"its shape is {list(tensor.shape)}, expected {expected}."
            )
        elif axis == 1:
            yield from _too_short(tensor, layers)
        elif tensor.shape[1] > MAX_WIDTH:
            reason = f"it has {tensor.shape[1]:,} columns; the limit is {MAX_WIDTH:,}."
            yield rules.PROJECTIONS_TOO_LARGE.at(tensor.name, reason)
    total = sum(tensor.nbytes for tensor in pair.values())
    if total > MAX_PROJECTION_BYTES:
        yield rules.PROJECTIONS_TOO_LARGE.at(
            WEIGHTS_NAME, f"A and B take {total:,} bytes; the limit is {MAX_PROJECTION_BYTES:,}."
        )


def _too_short(B: TensorData, layers: Mapping[str, AdaptedLayer]) -> Iterator[Finding]:
    for layer in layers.values():
        if layer.lambda_b.shape and layer.out_features > B.shape[0]:
            yield rules.PROJECTION_TOO_SHORT.at(
                printable(layer.module),
                f"it has {layer.out_features} outputs, vera_B {B.shape[0]} rows.",
            )
