"""torchao, weights alone: int8, int4 (a value in each int8) and float8, with a scale per group.

    W = cast(float32(q - zero) * float32(scale))

The header of the file names the class of each weight; the class decides the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vera_convert.base.quantized.layer import (
    SCALE_DTYPES,
    Array,
    Check,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
    size_pair,
)
from vera_convert.base.quantized.packing import DTYPE_OF, FLOAT_OF, rows_of, scaled_rows
from vera_convert.errors import CheckpointError
from vera_convert.files.strict_json import parse_json
from vera_convert.text import printable

QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_CLASSES = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
}
"""The supported classes, with the dtypes of the values."""
MAX_TEXT = 16_384
"""The most characters to read of a header's entry for a weight."""


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or the class is not supported.
    """
    kind, data, parts = _said(layer)
    rows, columns = layer.main(QDATA, _CLASSES[kind])
    block, dtype = size_pair(data.get("block_size")), _dtype(data.get("dtype"))
    if dtype is None:
        raise layer.unsupported(QDATA, "the header names no dtype that is known.")
    if block is None or block[0] != 1 or columns % block[1]:
        raise layer.unsupported(QDATA, "the header's block_size is no part of one row.")
    shape = rows, columns // block[1]
    scale = layer.part(SCALE, SCALE_DTYPES, shape)
    checks: dict[str, Check] = {scale: finite}
    zero = None
    if ZERO in layer.tensors:
        zero = layer.part(ZERO, ("I8", "I32"), shape)
        checks[zero] = finite
    known = tuple(rest for rest in (QDATA, SCALE, ZERO) if rest in layer.tensors)
    if {rest.removeprefix("_weight_") for rest in known} != {*parts}:
        raise layer.missing(QDATA, f"the header names {', '.join(map(printable, parts))}.")
    q = layer.name(QDATA)

    def decode(read: PartReader, first: int, last: int) -> Array:
        factors = read.rows(scale, first, last)
        zeros = None if zero is None else read.rows(zero, first, last)
        values, size = rows_of(read.rows(q, first, last)), (last - first, columns)
        return scaled_rows(values, size, factors, zeros, width=block[1], dtypes=(FLOAT_OF[dtype],))

    left_out = layer.refuse_others(known)
    yield PackedWeight(layer.name("weight"), (rows, columns), q, left_out, decode, checks)


def _said(layer: Layer) -> tuple[str, Mapping[str, object], list[str]]:
    """Return the class, the data and the parts that the header names for a weight.

    Raises:
        LayerError: the header lacks a class, data or parts, or the class is not supported.
    """
    if layer.metadata is None:
        raise layer.missing(QDATA, "the header of the file says nothing of it.")
    try:
        document = parse_json(layer.metadata[:MAX_TEXT].encode(), place=QDATA)
    except CheckpointError:
        document = None
    if not isinstance(document, dict):
        raise layer.malformed(QDATA, "its text in the header is no JSON object.")
    kind, data, parts = (document.get(k) for k in ("_type", "_data", "_tensor_data_names"))
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise layer.unsupported(QDATA, f'the class "{printable(str(kind))}" is not supported.')
    if not isinstance(data, dict) or not isinstance(parts, list):
        raise layer.malformed(QDATA, "the header names neither data nor parts.")
    return kind, data, [str(part) for part in parts]


def _dtype(said: object) -> str | None:
    name = said.get("_data") if isinstance(said, Mapping) else None
    return DTYPE_OF.get(name) if isinstance(name, str) else None


FORMAT = Format(
    "torchao",
    "torchao",
    weights,
    signs="_weight_(qdata|scale|zero_point|.*_data)",
    packed=QDATA,
    cast="model",
)
