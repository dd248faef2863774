"""MXFP4 (gpt-oss): experts as 4-bit floats, each group of 32 with a power of two.

    W = value * 2^(scale - 127)

The packed experts are (outputs, inputs), the weights of the model (inputs, outputs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vera_convert.base.quantized.layer import (
    Array,
    Decode,
    Format,
    Layer,
    PackedWeight,
    PartReader,
)
from vera_convert.base.quantized.packing import BFLOAT16, E2M1, looked_up, pair_table

_PAIRS = pair_table(E2M1, high_first=False)
_POWERS = np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32)
_READ_BYTES = 1 << 18


def dequantized(blocks: Array, scales: Array) -> Array:
    """Return values in bfloat16: (..., groups, 16) bytes give (..., groups * 32) values.

    Args:
        blocks: (..., groups, bytes), two codes in each byte, the low half first.
        scales: (..., groups), powers of two, plus 127.
    """
    values = looked_up(_PAIRS, blocks)
    values *= _POWERS[scales][..., None]  # exact, but for values beyond the range of float32
    return values.astype(BFLOAT16).reshape(*values.shape[:-2], -1)


def _inputs_of_expert(read: PartReader, parts: _Parts, expert: int, wanted: slice) -> Array:
    """Return some inputs of an expert, (inputs, outputs), reading a few outputs at a time."""
    groups, start = slice(wanted.start // 32, -(-wanted.stop // 32)), expert * parts.outputs
    inside = slice(wanted.start - groups.start * 32, wanted.stop - groups.start * 32)
    out = np.empty((wanted.stop - wanted.start, parts.outputs), BFLOAT16)
    size = parts.groups * 16
    step = max(1, _READ_BYTES // size)
    for first in range(0, parts.outputs, step):
        last = min(first + step, parts.outputs)
        blocks = read.raw(parts.blocks, (start + first) * size, (start + last) * size)
        scales = read.flat(
            parts.scales, (start + first) * parts.groups, (start + last) * parts.groups
        )
        values = dequantized(
            blocks.reshape(last - first, parts.groups, 16)[:, groups],
            scales.reshape(last - first, parts.groups)[:, groups],
        )
        out[:, first:last] = values[:, inside].T
    return out


class _Parts(NamedTuple):
    """The tensors of packed experts, with the outputs and the groups of inputs of one expert."""

    blocks: str
    scales: str
    outputs: int
    groups: int


def _decoder(parts: _Parts) -> Decode:
    """Return the function that computes rows (expert, input): a row is a column of the blocks."""

    def rows(read: PartReader, first: int, last: int) -> Array:
        inputs, found = parts.groups * 32, []
        while first < last:
            expert, begin = divmod(first, inputs)
            end = min(inputs, begin + last - first)
            found.append(_inputs_of_expert(read, parts, expert, slice(begin, end)))
            first += end - begin
        return np.concatenate(found)

    return rows


def weights(layer: Layer) -> Iterator[PackedWeight]:
    """Yield the weights of a module of experts.

    Raises:
        LayerError: a part is missing, superfluous or malformed.
    """
    stems = [m[1] for rest in layer.tensors if (m := re.fullmatch("(.+)_(?:blocks|scales)", rest))]
    for rest in layer.tensors:
        if not re.fullmatch(".+_(blocks|scales|bias)", rest):
            raise layer.unsupported(rest, "the format has no such part.")
    for stem in dict.fromkeys(stems):
        if f"{stem}_blocks" not in layer.tensors:
            raise layer.missing(f"{stem}_blocks", "its scales are there.")
        experts, outputs, groups, _ = layer.main(f"{stem}_blocks", ("U8",), 4)
        blocks = layer.part(f"{stem}_blocks", ("U8",), (experts, outputs, groups, 16))
        scales = layer.part(f"{stem}_scales", ("U8",), (experts, outputs, groups))
        yield PackedWeight(
            layer.name(stem),
            (experts, groups * 32, outputs),
            blocks,
            (blocks, scales),
            _decoder(_Parts(blocks, scales, outputs, groups)),
            {scales: _no_255},
        )


def _no_255(values: Array) -> str | None:
    return "a value is 255, which is NaN in the standard." if (values == 255).any() else None


FORMAT = Format("MXFP4", "mxfp4", weights, signs=".+_blocks", cast="model")
