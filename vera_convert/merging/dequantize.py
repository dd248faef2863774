"""fp8 weights with their scales made into 16-bit ones: all of a base, or nothing.

    W = w8 * scale        in float32; one scale for all, for each row, or for each block

Blocks are those of the config (128 by 128 where it is silent); the last ones may be cut off by the
edge of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized import CONFIG_FIELDS, FP8, kind_of_siblings, layer_of
from vera_convert.dtypes import FLOATS, HEADER_NAMES, SIXTEEN_BIT, float_name
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.files.json_edit import removed_member
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.rules import (
    DEQUANTIZED,
    NOT_DEQUANTIZABLE,
    SCALE_MISSING,
    SCALE_UNKNOWN,
    Finding,
)
from vera_convert.text import printable

SIDE_FILES = frozenset(("hf_quant_config.json", "quantize_config.json", "quant_config.json"))
"""Files beside the weights that say how they are quantized."""

_SCALES = ("weight_scale_inv", "weight_scale")
"""The factors of a weight. The first is the inverse of what the weight was once scaled by."""
_OF_ACTIVATIONS = frozenset(
    ("input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale")
)
"""Scales of what flows between layers: of no use where nothing is quantized."""
_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of one weight.

    Attributes:
        name: of the tensor that holds them.
        block: rows and columns of the weight that one scale is for.
        across: how many blocks lie side by side.
    """

    name: str
    block: tuple[int, int]
    across: int


@dataclass(frozen=True, slots=True)
class Dequantization:
    """What must change to make a 16-bit model of a base.

    Attributes:
        scales: those of each quantized weight, by its name.
        dropped: names of tensors that are left out, the scales among them.
        dtype: what the weights become, as safetensors names it.
    """

    scales: Mapping[str, Scale]
    dropped: frozenset[str]
    dtype: str

    def finding(self, place: str) -> Finding:
        """Return a note of what is done to the base that is called `place`."""
        reason = (
            f"{len(self.scales):,} weights become {self.dtype}; {len(self.dropped):,} scales are "
            "left out."
        )
        return DEQUANTIZED.at(place, reason)


def plan_dequantization(base: BaseModel) -> Dequantization:
    """Find the scales of every quantized weight of a base.

    Raises:
        CheckpointError: with every tensor that has none, or that is quantized in another way.
    """
    defects: list[Finding] = []
    scales: dict[str, Scale] = {}
    dropped = set()
    layers = {layer_of(name)[0] for name, each in base.tensors.items() if each.info.dtype in FP8}
    around = layers | {path.rpartition(".")[0] for path in layers}
    for name, tensor in base.tensors.items():
        path, rest = layer_of(name)
        if tensor.info.dtype in FP8 and rest == "weight":
            found = _scale(base, path, tensor.info)
            if isinstance(found, Finding):
                defects.append(found)
            else:
                scales[name] = found
        elif (rest in _SCALES and path in layers) or (rest in _OF_ACTIVATIONS and path in around):
            dropped.add(name)
        elif kind_of_siblings(rest) is not None or not _is_plain(rest, tensor.info.dtype):
            reason = f"its dtype is {tensor.info.dtype}."
            defects.append(NOT_DEQUANTIZABLE.at(printable(name), reason))
    if defects:
        raise CheckpointError.of(defects)
    return Dequantization(scales, frozenset(dropped), _dtype(base.config))


def dequantized_config(text: bytes, config: Mapping[str, object]) -> bytes:
    """Return a config's text without what it says of quantization.

    Args:
        text: the config's bytes.
        config: its value.
    """
    for path in _paths(config):
        text = removed_member(text, path)
    return text


def _paths(config: Mapping[str, object]) -> Iterator[tuple[str, ...]]:
    for name, part in config.items():
        if name in CONFIG_FIELDS:
            yield (name,)
        elif isinstance(part, Mapping):
            yield from ((name, *rest) for rest in _paths(part))


def _is_plain(rest: str, dtype: str) -> bool:
    """Say whether a tensor holds values as they are: floats, or a buffer of whole numbers."""
    return dtype in FLOATS or (dtype in ("BOOL", "I64", "I32") and "weight" not in rest)


def _dtype(config: Mapping[str, object]) -> str:
    """Return the 16-bit dtype that a config names, or bfloat16."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for field in ("dtype", "torch_dtype"):
            named = part.get(field)
            name = float_name(named) if isinstance(named, str) else None
            if name is not None and HEADER_NAMES[name] in SIXTEEN_BIT:
                return HEADER_NAMES[name]
    return "BF16"


# --- scales --------------------------------------------------------------------------------------


def _scale(base: BaseModel, path: str, weight: TensorInfo) -> Scale | Finding:
    names = [name for each in _SCALES if (name := f"{path}.{each}") in base.tensors]
    if not names:
        return SCALE_MISSING.at(printable(weight.name), f"it is {weight.dtype}.")
    name, info = names[0], base.tensors[names[0]].info
    block = _block(weight.shape, info.shape, _block_size(base.config))
    others = [other for other in names[1:] if other in base.tensors]
    others += [other for other in (f"{path}.weight_zero_point",) if other in base.tensors]
    if block is None or others or info.dtype not in FLOATS - {"F64"}:
        also = "".join(f" and {printable(other)}" for other in others)
        reason = (
            f"it has the shape {list(weight.shape)}, {printable(name)} {list(info.shape)} of "
            f"{info.dtype}{also}."
        )
        return SCALE_UNKNOWN.at(printable(weight.name), reason)
    return Scale(name, block, -(-weight.shape[1] // block[1]))


def _block(
    weight: tuple[int, ...], scales: tuple[int, ...], size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns that one scale is for; None if the shapes do not tell."""
    if len(weight) != 2 or 0 in weight:
        return None
    rows, columns = weight
    if all(count == 1 for count in scales):
        return rows, columns
    if size is not None and scales == _blocks(weight, size):
        return size
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if size is None and scales == _blocks(weight, _BLOCK):
        return _BLOCK
    return None


def _blocks(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // size[0]), -(-shape[1] // size[1])


def _block_size(config: Mapping[str, object]) -> tuple[int, int] | None:
    """Return the ``weight_block_size`` of a config or of a part of it."""
    for name, part in config.items():
        if not isinstance(part, Mapping):
            continue
        found = part.get("weight_block_size") if name in CONFIG_FIELDS else _block_size(part)
        match found:
            case [int(rows), int(columns)] | (int(rows), int(columns)) if min(rows, columns) > 0:
                return rows, columns
    return None


# --- values --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Makes rows of a quantized weight float32.

    The scales are read for each block anew: those of all weights together can be large.

    Attributes:
        source: the file that holds the scales.
        start: where they begin in it.
        dtype: theirs.
        scale: how they are laid out.
    """

    source: InputFile
    start: int
    dtype: np.dtype[Any]
    scale: Scale

    def __call__(self, stored: NDArray[Any], first: int) -> NDArray[np.float32]:
        """Return the rows (n, columns) from row `first` on as float32."""
        rows, across = self.scale.block[0], self.scale.across
        begin, end = first // rows, -(-(first + len(stored)) // rows)
        row = across * self.dtype.itemsize
        with self.source.open() as file:
            raw = file.read_at(self.start + begin * row, (end - begin) * row)
        factors = np.frombuffer(raw, self.dtype).reshape(end - begin, across)
        return scaled(stored, factors, first=first % rows, block=self.scale.block)


def decoder(base: BaseModel, files: Mapping[str, InputFile], scale: Scale) -> Decoder:
    """Return what makes rows of a weight float32.

    Args:
        base: the base.
        files: its weight files, by name.
        scale: how the weight's scales are laid out.
    """
    tensor = base.tensors[scale.name]
    start = base.files[tensor.file].data_start + tensor.info.start
    return Decoder(files[tensor.file], start, NUMPY_DTYPE[tensor.info.dtype], scale)


def scaled(
    stored: NDArray[Any], factors: NDArray[Any], *, first: int, block: tuple[int, int]
) -> NDArray[np.float32]:
    """Return rows of a matrix times the factors of their blocks, in float32.

    Args:
        stored: (n, columns), of any float dtype.
        factors: one for each block that the rows lie in, (blocks, blocks across).
        first: the number of the first row within its block.
        block: rows and columns of a block; the last block of a row may be narrower.
    """
    values = stored.astype(np.float32)
    of_rows = factors.astype(np.float32)[(first + np.arange(len(values))) // block[0]]
    width = block[1]
    whole = values.shape[1] // width
    inner = values[:, : whole * width].reshape(len(values), whole, width)
    inner *= of_rows[:, :whole, None]
    values[:, whole * width :] *= of_rows[:, whole:]
    return values
