"""fp8 with scales in a float dtype: one scale for all, for each row, or for each block.

    W = w8 * scale        in float32

The config gives the size of a block (128 by 128 by default); the edge of the matrix may cut the
last blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vera_convert.base.quantized.layer import (
    KEPT_IF_DEQUANTIZED,
    SCALE_DTYPES,
    Array,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
    size_pair,
)
from vera_convert.base.quantized.packing import FLOAT32, rows_of, scaled_rows

DTYPES = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale_inv", "weight_scale")
"""The factors of a weight. The first is the inverse of the quantizer's own factor."""
_AMBIGUOUS = frozenset((("weight_scale", "BF16"), ("weight_scale", "F16")))
"""Scales of compressed-tensors too, where the product is in the dtype of the scales."""
_OF_ACTIVATIONS = frozenset(
    ("input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale")
)
"""Scales of the values between layers: a dequantized model leaves these scales out."""
_BLOCK = (128, 128)


def dequantized(
    stored: Array, factors: Array, *, first: int, block: tuple[int, int]
) -> NDArray[np.float32]:
    """Return rows of a matrix times the factors of their blocks, in float32.

    Args:
        stored: (n, columns), of any float dtype.
        factors: (blocks, blocks across), a factor for each block of the rows.
        first: the number of the first row within its block.
        block: rows and columns of a block; the last block of a row may be narrower.
    """
    of_rows = factors[(first + np.arange(len(stored))) // block[0]]
    return scaled_rows(rows_of(stored), stored.shape, of_rows, width=block[1], dtypes=(FLOAT32,))


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed.
    """
    found = layer.tensors.get("weight")
    if found is not None and found.dtype not in DTYPES:
        raise layer.unsupported("weight", f"its dtype is {found.dtype}.")
    shape = layer.main("weight", DTYPES)
    rests = [rest for rest in SCALES if rest in layer.tensors]
    if not rests:
        reason = f"the weight is {layer.tensors['weight'].dtype}, and has no scale."
        raise layer.missing("weight", reason)
    if len(rests) > 1:
        raise layer.malformed(rests[1], f"{rests[0]} lies there as well.")
    scale = layer.tensors[rests[0]]
    size = size_pair(layer.settings.get("weight_block_size"))
    block = _block(shape, scale.shape, size)
    if block is None or scale.dtype not in SCALE_DTYPES:
        reason = f"the weight's shape is {[*shape]}, its scale's {[*scale.shape]} of {scale.dtype}."
        reason += f" The config's blocks are {size[0]:,} by {size[1]:,}." if size else ""
        raise layer.malformed(rests[0], reason)
    if (rests[0], scale.dtype) in _AMBIGUOUS and not layer.settings.get("quant_method"):
        reason = (
            f"the config names no quant_method, and each rounds the product with a {scale.dtype}"
        )
        raise layer.unsupported(rests[0], f"{reason} scale in another way.")
    weight, name = layer.name("weight"), layer.name(rests[0])
    across = -(-shape[1] // block[1])

    def rows(read: PartReader, first: int, last: int) -> Array:
        begin, end = first // block[0], -(-last // block[0])
        factors = read.flat(name, begin * across, end * across).reshape(end - begin, across)
        stored = read.rows(weight, first, last)
        return dequantized(stored, factors, first=first % block[0], block=block)

    parts = layer.refuse_others(("weight", rests[0]), _OF_ACTIVATIONS)
    yield PackedWeight(weight, shape, weight, parts, rows, {name: finite})


def _block(
    weight: tuple[int, ...], scales: tuple[int, ...], size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns for each scale; None if the shapes leave the block open."""
    rows, columns = weight
    if size is not None:
        blocks = _blocks(weight, size)
        is_single = blocks == (1, 1) and scales in ((), (1,))
        return size if scales == blocks or is_single else None
    if all(count == 1 for count in scales):
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    return _BLOCK if scales == _blocks(weight, _BLOCK) else None


def _blocks(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // size[0]), -(-shape[1] // size[1])


FORMAT = Format(
    "fp8",
    "fp8",
    weights,
    signs="weight_scale(_inv)?|input_scale(_ub)?",
    dtypes=DTYPES,
    undecided=(
        "PEFT rounds to the model's dtype if the base is loaded dequantized (on a CPU always), and "
        "to float8_e4m3fn if its layers stay fp8."
    ),
    dropped=_OF_ACTIVATIONS,
    plain=KEPT_IF_DEQUANTIZED,
)
