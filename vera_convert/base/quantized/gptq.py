"""GPTQ with 2, 3, 4 or 8 bits: codes packed along the inputs, a scale and a zero for each group.

    W[out, in] = float16(scales[g, out] * (q - zero[g, out])),   g = g_idx[in]

The files of the first version store each zero less 1. The library adds 1 to all fields of a word in
one sum, modulo 2^32, and a field that borrowed from the next field gives the loan back. Fields of 3
bits can lie in two words: the library adds 1 to each field by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vera_convert.base.quantized.layer import (
    KERNELS_DECIDE,
    Array,
    Check,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    finite,
    group_count,
    texts_of,
    whole,
)
from vera_convert.base.quantized.packing import FLOAT16, integers, scaled_rows, stream
from vera_convert.text import printable

_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_VERSIONS = {"gptq": True, "gptq_v2": False}
"""Whether a version of the files stores zeros less 1."""
_VERSION_FIELDS = ("checkpoint_format", "format")
"""The old and the new name of the version field; libraries differ in the name read first."""
_UNSAFE = ("rotation", "adapter", "eora")


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or a setting is unsafe.
    """
    bits, less_one = _settings(layer)
    words, outputs = layer.main("qweight", ("I32",))
    inputs = words * 32 // bits
    if words * 32 % bits or outputs * bits % 32:
        reason = f"{words:,} words or {outputs:,} outputs of {bits} bits fill no words of 32."
        raise layer.malformed("qweight", reason)
    groups = group_count(layer, inputs)
    qweight = layer.name("qweight")
    qzeros = layer.part("qzeros", ("I32",), (groups, outputs * bits // 32))
    scales = layer.part("scales", ("F16",), (groups, outputs))
    checks: dict[str, Check] = {scales: finite}
    g_idx = None
    if "g_idx" in layer.tensors or layer.settings.get("desc_act"):
        g_idx = layer.part("g_idx", ("I32",), (inputs,))
        checks[g_idx] = lambda values: _inside(values, groups)

    def rows(read: PartReader, first: int, last: int) -> Array:
        begin, end = first // 32 * bits, min(-(-last // 32) * bits, outputs * bits // 32)
        zeros = _zeros(read.columns(qzeros, begin, end), bits, less_one=less_one)
        zeros = zeros[:, first % 32 : first % 32 + last - first].T
        factors = read.columns(scales, first, last).T
        width = inputs // groups
        if g_idx:
            of_inputs = read.flat(g_idx, 0, inputs)
            if (of_inputs != np.arange(inputs) // width).any():
                width = 1
                zeros, factors = (
                    np.take(each, of_inputs, axis=1, mode="clip") for each in (zeros, factors)
                )
        q, shape = (
            integers(read.columns(qweight, first, last).T, bits, inputs),
            (last - first, inputs),
        )
        return scaled_rows(q, shape, factors, zeros, width=width, dtypes=(FLOAT16,))

    parts = layer.refuse_others(("qweight", "qzeros", "scales", "g_idx"))
    yield PackedWeight(layer.name("weight"), (outputs, inputs), qweight, parts, rows, checks)


def _zeros(words: Array, bits: int, *, less_one: bool) -> Array:
    """Return the zero points in words of 32 bits, (groups, n)."""
    words = words.astype("<u4")
    if less_one and bits != 3:
        words += np.uint32(_ONES[bits])
    zeros = stream(words, bits, 0, words.shape[1] * 32 // bits)
    return (zeros + 1) & 7 if less_one and bits == 3 else zeros


def _settings(layer: Layer) -> tuple[int, bool]:
    """Return the bits of a code, and whether the files store zeros less 1.

    Raises:
        LayerError: the config holds a setting outside the known safe settings.
    """
    settings = layer.settings
    bits = whole(settings, "bits")
    versions = texts_of(settings, _VERSION_FIELDS) or {"gptq"}
    reason = ""
    if bits not in _BITS:
        reason = f"bits is {printable(repr(settings.get('bits')))}; 2, 3, 4 and 8 are supported."
    elif settings.get("is_marlin_format") or not versions <= _VERSIONS.keys():
        others = versions - _VERSIONS.keys() or {"marlin"}
        reason = f'the format "{printable(min(others))}" is not supported, only gptq and gptq_v2.'
    elif len(versions) > 1:
        reason = "checkpoint_format and format name two versions, whose zero points differ."
    elif settings.get("pack_dtype") not in (None, "int32"):
        reason = "only the pack_dtype int32 is supported."
    meta = settings.get("meta")
    if isinstance(meta, Mapping) and any(
        meta.get(name) not in (None, False, {}, [], "") for name in _UNSAFE
    ):
        reason = "the config's meta has a rotation or an adapter, which changes the weights."
    if reason or bits is None:
        raise layer.unsupported("qweight", reason)
    return bits, _VERSIONS[versions.pop()]


def _inside(values: Array, groups: int) -> str | None:
    if values.size and (int(values.min()) < 0 or int(values.max()) >= groups):
        return f"a value is none of the {groups:,} groups."
    return None


FORMAT = Format(
    "GPTQ",
    "gptq",
    weights,
    signs="qweight|qzeros|g_idx|scales",
    packed="qweight",
    undecided=KERNELS_DECIDE,
    needs_config=True,
    plain=None,
)
