"""GPTQ with 4 or 8 bits: codes packed along the inputs, one scale and zero for each group.

    W[out, in] = float16(scales[g, out] * (q - zero[g, out])),   g = g_idx[in]

The files of the first version store each zero less one: one is added to all fields of a word at
once, modulo 2^32, so that a field that borrowed from its neighbor gives the loan back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vera_convert.base.quantized.layer import (
    KERNELS_DECIDE,
    Array,
    Check,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    filled,
    finite,
    whole,
)
from vera_convert.base.quantized.packing import FLOAT16, fields, pieces
from vera_convert.rules import NOT_DEQUANTIZABLE, PART_MALFORMED

_ONES = {4: 0x11111111, 8: 0x01010101}
_VERSIONS = {"gptq": True, "gptq_v2": False}
"""Whether a version of the files stores zeros less one, by its ``checkpoint_format``."""
_UNSAFE = frozenset(("rotation", "adapter", "eora"))


def dequantized(qweight: Array, zeros: Array, scales: Array, groups: Array, bits: int) -> Array:
    """Return rows of a weight, (n, in), in float16.

    Args:
        qweight: (in * bits / 32, n), int32: the words of these outputs.
        zeros: (groups, n), the zero points, as they are subtracted.
        scales: (groups, n), float16.
        groups: (in,), the group of each input.
        bits: 4 or 8.
    """
    words = np.ascontiguousarray(qweight.T)
    shifts = np.ascontiguousarray(zeros.T.astype(np.float32))
    factors = np.ascontiguousarray(scales.T.astype(np.float32))
    out = np.empty((len(words), len(groups)), FLOAT16)
    size = _even(groups, len(scales))
    for part in pieces(*out.shape):
        values = fields(words[part], bits).reshape(-1, len(groups)).astype(np.float32)
        if size:
            inner = values.reshape(len(values), len(scales), size)
            inner -= shifts[part, :, None]
            inner *= factors[part, :, None]
        else:
            values -= np.take(shifts[part], groups, axis=1, mode="clip")
            values *= np.take(factors[part], groups, axis=1, mode="clip")
        out[part] = values
    return out


def _even(groups: Array, count: int) -> int:
    """Return how many inputs each group has, if equal groups follow one another; else 0."""
    size = len(groups) // count
    is_even = size * count == len(groups)
    return size if is_even and bool((groups == np.arange(len(groups)) // size).all()) else 0


@dataclass(frozen=True, slots=True)
class _Decoder:
    qweight: str
    qzeros: str
    scales: str
    g_idx: str | None
    shape: tuple[int, int]
    groups: int
    bits: int
    less_one: bool

    def __call__(self, read: PartReader, first: int, last: int) -> Array:
        inputs, packed = self.shape[1], 32 // self.bits
        if self.g_idx is None:
            groups = np.arange(inputs) // (inputs // self.groups)
        else:
            groups = read.flat(self.g_idx, 0, inputs)
        begin, end = first // packed, -(-last // packed)
        words = read.columns(self.qzeros, begin, end).astype("<u4")
        if self.less_one:
            words += np.uint32(_ONES[self.bits])
        zeros = fields(words, self.bits).reshape(self.groups, -1)
        inside = slice(first - begin * packed, last - begin * packed)
        return dequantized(
            read.columns(self.qweight, first, last),
            zeros[:, inside],
            read.columns(self.scales, first, last),
            groups,
            self.bits,
        )


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weight of a layer.

    Raises:
        LayerError: a part is missing, superfluous or malformed, or a setting is unsafe.
    """
    bits, less_one = _settings(layer)
    words, outputs = layer.main("qweight", ("I32",))
    inputs = words * 32 // bits
    if outputs * bits % 32:
        reason = f"{outputs:,} outputs of {bits} bits fill no words of 32."
        raise layer.error(PART_MALFORMED, "qweight", reason)
    groups = _groups(layer, inputs)
    qweight = layer.part("qweight", ("I32",), (words, outputs))
    qzeros = layer.part("qzeros", ("I32",), (groups, outputs * bits // 32))
    scales = layer.part("scales", ("F16",), (groups, outputs))
    checks: dict[str, Check] = {scales: finite}
    g_idx = None
    if "g_idx" in layer.tensors or layer.settings.get("desc_act"):
        g_idx = layer.part("g_idx", ("I32",), (inputs,))
        checks[g_idx] = lambda values: _inside(values, groups)
    yield PackedWeight(
        layer.name("weight"),
        (outputs, inputs),
        qweight,
        layer.refuse_others(("qweight", "qzeros", "scales", "g_idx"), frozenset()),
        _Decoder(qweight, qzeros, scales, g_idx, (outputs, inputs), groups, bits, less_one),
        checks,
    )


def _settings(layer: Layer) -> tuple[int, bool]:
    """Return the bits of a code, and whether zeros are stored less one.

    Raises:
        LayerError: the config says anything that is not known to be safe.
    """
    settings = layer.settings
    bits = whole(settings, "bits")
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    reason = ""
    if bits not in _ONES:
        reason = "only 4 and 8 bits are supported."
    elif version not in _VERSIONS:
        reason = 'only the checkpoint_format "gptq" and "gptq_v2" are supported.'
    elif settings.get("pack_dtype") not in (None, "int32"):
        reason = "only the pack_dtype int32 is supported."
    meta = settings.get("meta")
    if isinstance(meta, Mapping) and not _UNSAFE.isdisjoint(filled(meta)):
        reason = "the config's meta has a rotation or an adapter, which changes the weights."
    if reason or bits is None:
        raise layer.error(NOT_DEQUANTIZABLE, "qweight", reason)
    return bits, _VERSIONS[str(version)]


def _groups(layer: Layer, inputs: int) -> int:
    """Return how many groups the inputs have.

    Raises:
        LayerError: the config's group size does not divide the inputs.
    """
    size = whole(layer.settings, "group_size")
    if size is None or size < -1 or size == 0:
        raise layer.error(NOT_DEQUANTIZABLE, "qweight", "the config names no group_size.")
    size = inputs if size == -1 else size
    if inputs % size:
        reason = f"{inputs:,} inputs are no multiple of the group size, {size:,}."
        raise layer.error(NOT_DEQUANTIZABLE, "qweight", reason)
    return inputs // size


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
)
