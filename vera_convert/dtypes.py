"""The dtypes of tensors, in one table: names, sizes, and the precision of floats.

A dtype has two names: the name in a safetensors header, such as ``BF16``, and the name that torch,
NumPy and ml_dtypes share, such as ``bfloat16``. This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Dtype(NamedTuple):
    """One dtype.

    Attributes:
        header: the name in a safetensors header.
        bits: the size of a value.
        name: the name in torch, NumPy and ml_dtypes; empty if these cannot hold single values.
    """

    header: str
    bits: int
    name: str = ""


class Precision(NamedTuple):
    """How exact a floating-point dtype is.

    Attributes:
        mantissa: bits after the point.
        lowest: the exponent of the smallest normal number.
        spellings: further names that people write.
    """

    mantissa: int
    lowest: int
    spellings: tuple[str, ...]


# In the order of the safetensors library, which sorts tensors by falling place in this list.
_DTYPES = (
    Dtype("BOOL", 8, "bool"),
    Dtype("F4", 4),
    Dtype("F6_E2M3", 6),
    Dtype("F6_E3M2", 6),
    Dtype("U8", 8, "uint8"),
    Dtype("I8", 8, "int8"),
    Dtype("F8_E5M2", 8, "float8_e5m2"),
    Dtype("F8_E4M3", 8, "float8_e4m3fn"),
    Dtype("F8_E8M0", 8, "float8_e8m0fnu"),
    Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    Dtype("I16", 16, "int16"),
    Dtype("U16", 16, "uint16"),
    Dtype("F16", 16, "float16"),
    Dtype("BF16", 16, "bfloat16"),
    Dtype("I32", 32, "int32"),
    Dtype("U32", 32, "uint32"),
    Dtype("F32", 32, "float32"),
    Dtype("C64", 64, "complex64"),
    Dtype("F64", 64, "float64"),
    Dtype("I64", 64, "int64"),
    Dtype("U64", 64, "uint64"),
)

PRECISION: Mapping[str, Precision] = {
    "F64": Precision(52, -1022, ("fp64", "f64", "double")),
    "F32": Precision(23, -126, ("fp32", "f32", "float")),
    "BF16": Precision(7, -126, ("bf16",)),
    "F16": Precision(10, -14, ("fp16", "f16", "half")),
}
"""The floating-point dtypes that weights are computed in, by header name, the widest first."""

BITS: Mapping[str, int] = {dtype.header: dtype.bits for dtype in _DTYPES}
"""Bits of a value, by header name, in the order of the safetensors library."""

NAMES: Mapping[str, str] = {dtype.header: dtype.name for dtype in _DTYPES if dtype.name}
"""The name in torch, NumPy and ml_dtypes, by header name."""

HEADER_NAMES: Mapping[str, str] = {name: header for header, name in NAMES.items()}
"""The header name, by the name in torch, NumPy and ml_dtypes."""

FLOATS = frozenset(PRECISION)
"""The header names of the dtypes that weights are computed in; 8-bit floats need scales."""

SIXTEEN_BIT = frozenset(header for header in FLOATS if BITS[header] == 16)
"""The header names of the 16-bit floats."""

FLOAT_NAMES = tuple(NAMES[header] for header in PRECISION)
"""The choices of an option that takes a dtype."""

BASE_NAMES = (*FLOAT_NAMES, "float8_e4m3fn")
"""The choices of an option that takes the dtype of a base's layers in memory."""

USUAL_OF_BASES = ("float32", "bfloat16", "float16")
"""The dtypes in which models are usually loaded."""

DTYPES_OF_LAYERS = (*USUAL_OF_BASES, "float8_e4m3fn")
"""The dtypes that layers of loaded models usually have; the layers of an fp8 base can stay fp8."""

_NAME_OF_SPELLING = {
    spelling: NAMES[header]
    for header, spellings in (
        *((header, precision.spellings) for header, precision in PRECISION.items()),
        ("F8_E4M3", ("f8_e4m3", "fp8_e4m3")),
    )
    for spelling in (NAMES[header], *spellings)
}


def float_name(written: str, choices: Sequence[str] = FLOAT_NAMES) -> str | None:
    """Return torch's name of a floating-point dtype.

    Args:
        written: any usual spelling, such as ``bfloat16``, ``BF16`` or ``torch.bfloat16``.
        choices: the possible names.

    Returns:
        A name of `choices`, or None if the text names no such dtype.
    """
    name = _NAME_OF_SPELLING.get(written.lower().removeprefix("torch."))
    return name if name in choices else None


def holds_every_value(wide: str, narrow: str) -> bool:
    """Return whether a float dtype can express every value of another one (header names)."""
    if wide not in PRECISION:
        return False
    a, b = PRECISION[wide], PRECISION[narrow]
    return a.mantissa >= b.mantissa and a.lowest <= b.lowest
