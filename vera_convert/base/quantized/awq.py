"""AWQ in the layout "gemm", 4 bits: codes packed along the outputs, in AWQ's own order.

W[out, in] = float16(float16(scales[g, out]) * (q - zero[g, out])),   g = in // group size
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vera_convert.base.quantized.layer import (
    KERNELS_DECIDE,
    SCALE_DTYPES,
    Array,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
    group_count,
    texts_of,
)
from vera_convert.base.quantized.packing import FLOAT16, scaled_rows
from vera_convert.text import printable

_SHIFTS = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int32) * 4
"""The lowest bit in a word of each of the eight outputs in the word."""


def codes(words: Array) -> Array:
    """Return the codes of words of eight outputs: (n, inputs) words give (8 n, inputs) codes."""
    return ((words[:, None] >> _SHIFTS[:, None]) & 15).reshape(-1, words.shape[1])


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or a setting is unsafe.
    """
    _check_settings(layer)
    inputs, words = layer.main("qweight", ("I32",))
    outputs, groups = words * 8, group_count(layer, inputs)
    qweight = layer.name("qweight")
    qzeros = layer.part("qzeros", ("I32",), (groups, words))
    scales = layer.part("scales", SCALE_DTYPES, (groups, outputs))

    def rows(read: PartReader, first: int, last: int) -> Array:
        begin, end, skipped = first // 8, -(-last // 8), first % 8
        packed = np.ascontiguousarray(read.columns(qweight, begin, end).T)

        def q(part: slice) -> NDArray[np.float32]:
            start, stop = part.start + skipped, part.stop + skipped
            found = codes(packed[start // 8 : -(-stop // 8)])
            return found[start % 8 : start % 8 + stop - start].astype(np.float32)

        zeros = codes(read.columns(qzeros, begin, end).T)[skipped : skipped + last - first]
        factors = read.columns(scales, first, last).astype(FLOAT16).T  # the library loads float16
        shape, width = (last - first, inputs), inputs // groups
        return scaled_rows(q, shape, factors, zeros, width=width, dtypes=(FLOAT16,))

    parts = layer.refuse_others(("qweight", "qzeros", "scales"))
    yield PackedWeight(
        layer.name("weight"), (outputs, inputs), qweight, parts, rows, {scales: finite}
    )


def _check_settings(layer: Layer) -> None:
    bits = texts_of(layer.settings, ("bits", "w_bit")) - {"4"}
    if bits:
        raise layer.unsupported(
            "qweight", f"{printable(min(bits))} bits are not supported, only 4."
        )
    versions = texts_of(layer.settings, ("version", "format", "checkpoint_format")) - {"gemm"}
    if versions:
        reason = f'the version "{printable(min(versions))}" is not supported, only gemm'
        raise layer.unsupported("qweight", f"{reason}: the others pack in another order.")
    if "g_idx" in layer.tensors:
        raise layer.malformed("g_idx", "AWQ has no such part: this may be GPTQ.")


FORMAT = Format(
    "AWQ",
    "awq",
    weights,
    signs="qweight|qzeros|g_idx|scales",
    packed="qweight",
    undecided=KERNELS_DECIDE,
    needs_config=True,
    plain=None,
)
