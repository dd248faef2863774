"""AWQ in the layout "gemm", 4 bits: codes packed along the outputs, in an order of its own.

W[out, in] = float16(float16(scales[g, out]) * (q - zero[g, out])),   g = in // group size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vera_convert.base.quantized.layer import (
    KERNELS_DECIDE,
    SCALE_DTYPES,
    Array,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
    whole,
)
from vera_convert.base.quantized.packing import FLOAT16, fields, pieces
from vera_convert.rules import NOT_DEQUANTIZABLE, PART_MALFORMED

_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""The field of a word that holds each of its eight outputs."""


def codes(words: Array) -> Array:
    """Return the codes of rows of words: (n, columns) words give (n, 8 columns) codes."""
    return fields(words, 4)[:, :, _PLACES].reshape(len(words), -1)


def dequantized(q: Array, zeros: Array, scales: Array) -> Array:
    """Return rows of a weight, (n, in), in float16.

    Args:
        q: (in, n), codes from 0 to 15.
        zeros: (groups, n), codes.
        scales: (groups, n), of any float dtype; the library loads them as float16.
    """
    rows = np.ascontiguousarray(q.T)
    shifts = zeros.T.astype(np.float32)
    factors = scales.T.astype(FLOAT16).astype(np.float32)
    out = np.empty(rows.shape, FLOAT16)
    for part in pieces(*rows.shape):
        values = rows[part].astype(np.float32)
        inner = values.reshape(len(values), len(scales), -1)
        inner -= shifts[part, :, None]
        inner *= factors[part, :, None]
        out[part] = values
    return out


@dataclass(frozen=True, slots=True)
class _Decoder:
    qweight: str
    qzeros: str
    scales: str

    def __call__(self, read: PartReader, first: int, last: int) -> Array:
        begin, end = first // 8, -(-last // 8)
        inside = slice(first - begin * 8, last - begin * 8)
        return dequantized(
            codes(read.columns(self.qweight, begin, end))[:, inside],
            codes(read.columns(self.qzeros, begin, end))[:, inside],
            read.columns(self.scales, first, last),
        )


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or a setting is unsafe.
    """
    _check_settings(layer)
    inputs, words = layer.main("qweight", ("I32",))
    outputs = words * 8
    size = whole(layer.settings, "group_size")
    size = inputs if size == -1 else size
    if size is None or size < 1 or inputs % size:
        reason = f"{inputs:,} inputs are no multiple of the config's group_size."
        raise layer.error(NOT_DEQUANTIZABLE, "qweight", reason)
    groups = inputs // size
    qweight = layer.name("qweight")
    qzeros = layer.part("qzeros", ("I32",), (groups, words))
    scales = layer.part("scales", SCALE_DTYPES, (groups, outputs))
    yield PackedWeight(
        layer.name("weight"),
        (outputs, inputs),
        qweight,
        layer.refuse_others(("qweight", "qzeros", "scales"), frozenset()),
        _Decoder(qweight, qzeros, scales),
        {scales: finite},
    )


def _check_settings(layer: Layer) -> None:
    settings = layer.settings
    named = {str(settings[key]).lower() for key in ("version", "format") if settings.get(key)}
    if whole(settings, "bits") not in (None, 4) or whole(settings, "w_bit") not in (None, 4):
        raise layer.error(NOT_DEQUANTIZABLE, "qweight", "only 4 bits are supported.")
    if named - {"gemm"}:
        reason = 'only the version "gemm" is supported: the others pack in another order.'
        raise layer.error(NOT_DEQUANTIZABLE, "qweight", reason)
    if "g_idx" in layer.tensors:
        raise layer.error(PART_MALFORMED, "g_idx", "AWQ has no such part: this may be GPTQ.")


FORMAT = Format(
    "AWQ",
    "awq",
    weights,
    signs="qweight|qzeros|g_idx|scales",
    packed="qweight",
    undecided=KERNELS_DECIDE,
    needs_config=True,
)
