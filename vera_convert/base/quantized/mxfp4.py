"""MXFP4 (gpt-oss): experts as 4-bit floats, each group of 32 with a power of two.

    W = value * 2^(scale - 127)

The packed experts are (outputs, inputs), the weights of the model (inputs, outputs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vera_convert.base.quantized.layer import (
    Array,
    Format,
    Layer,
    PackedWeight,
    PartReader,
    cast_to_model,
)
from vera_convert.base.quantized.packing import BFLOAT16, E2M1, looked_up, pair_table
from vera_convert.rules import NOT_DEQUANTIZABLE, PART_MISSING

_PAIRS = pair_table(E2M1, high_first=False)
_POWERS = np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32)
_READ_BYTES = 1 << 18


def dequantized(blocks: Array, scales: Array) -> Array:
    """Return values in bfloat16: (..., groups, 16) bytes give (..., groups * 32) values.

    Args:
        blocks: (..., groups, bytes), two codes in each byte, the low half first.
        scales: (..., groups), powers of two, plus 127.
    """
    values = looked_up(np.ascontiguousarray(blocks), _PAIRS)
    values *= _POWERS[scales][..., None]  # exact, but for values beyond the range of float32
    return values.astype(BFLOAT16).reshape(*values.shape[:-2], -1)


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Computes rows (expert, input) of the weights; each is a column of the packed ones."""

    blocks: str
    scales: str
    outputs: int
    groups: int

    def __call__(self, read: PartReader, first: int, last: int) -> Array:
        inputs = self.groups * 32
        found = []
        while first < last:
            expert, begin = divmod(first, inputs)
            end = min(inputs, begin + last - first)
            found.append(self._of_expert(read, expert, begin, end))
            first += end - begin
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _of_expert(self, read: PartReader, expert: int, begin: int, end: int) -> Array:
        """Return the inputs `begin` to `end` of an expert, a few of its outputs at a time."""
        groups, start = slice(begin // 32, -(-end // 32)), expert * self.outputs
        inside = slice(begin - groups.start * 32, end - groups.start * 32)
        out = np.empty((end - begin, self.outputs), BFLOAT16)
        step = max(1, _READ_BYTES // (self.groups * 16))
        for first in range(0, self.outputs, step):
            last = min(self.outputs, first + step)
            size = self.groups * 16
            blocks = read.raw(self.blocks, (start + first) * size, (start + last) * size)
            scales = read.flat(
                self.scales, (start + first) * self.groups, (start + last) * self.groups
            )
            values = dequantized(
                blocks.reshape(last - first, self.groups, 16)[:, groups],
                scales.reshape(last - first, self.groups)[:, groups],
            )
            out[:, first:last] = values[:, inside].T
        return out


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weights of a module of experts.

    Raises:
        LayerError: a part is missing, superfluous or malformed.
    """
    stems = [m[1] for rest in layer.tensors if (m := re.fullmatch("(.+)_(?:blocks|scales)", rest))]
    for rest in layer.tensors:
        if not re.fullmatch(".+_(blocks|scales|bias)", rest):
            raise layer.error(NOT_DEQUANTIZABLE, rest, "the format has no such part.")
    for stem in dict.fromkeys(stems):
        if f"{stem}_blocks" not in layer.tensors:
            raise layer.error(PART_MISSING, f"{stem}_blocks", "its scales are there.")
        shape = layer.main(f"{stem}_blocks", ("U8",), 4)
        experts, outputs, groups, _ = shape
        blocks = layer.part(f"{stem}_blocks", ("U8",), (experts, outputs, groups, 16))
        scales = layer.part(f"{stem}_scales", ("U8",), shape[:3])
        yield PackedWeight(
            layer.name(stem),
            (experts, groups * 32, outputs),
            blocks,
            (blocks, scales),
            _Decoder(blocks, scales, outputs, groups),
            {scales: _no_255},
        )


def _no_255(values: Array) -> str | None:
    return "a value is 255, which is NaN in the standard." if (values == 255).any() else None


FORMAT = Format("mxfp4", "mxfp4", weights, signs=".+_blocks", cast=cast_to_model)
