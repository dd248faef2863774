"""Make a 16-bit model of a quantized base: of all packed weights, or of none.

    packed weights ──► check the values ──► for each block of rows: read the parts, compute

`base.quantized` knows the formats. This module reads the parts of the weights, a few megabytes at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.layer import Array, PackedWeight
from vera_convert.base.quantized.recognize import CONFIG_FIELDS
from vera_convert.base.quantized.unpack import Unpacked
from vera_convert.dtypes import BITS
from vera_convert.errors import refuse
from vera_convert.files.json_edit import removed_member
from vera_convert.files.reading import LocalFile
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.rules import Finding
from vera_convert.text import printable

SIDE_FILES = frozenset(("hf_quant_config.json", "quantize_config.json", "quant_config.json"))
"""Files beside the weights with the settings of the quantization."""

_READ_BYTES = 1 << 22
_PANEL_BYTES, _MOST_PANELS = 1 << 23, 6
_SKIPPED_BYTES = 1 << 15
"""Reading this many bytes of a row takes as long as a second call for the next row."""


def dequantized_finding(packed: Unpacked, place: str) -> Finding:
    """Return a note that the base called `place` is dequantized."""
    count = sum(len(weight.parts) - 1 for weight in packed.weights.values())
    kinds = " and ".join(packed.labels)
    reason = (
        f"{len(packed.weights):,} weights ({kinds}) become {packed.dtype}; {count:,} scales "
        "and other parts are left out."
    )
    return rules.DEQUANTIZED.at(place, reason)


def check_values(packed: Unpacked, files: Mapping[str, InputFile]) -> None:
    """Read the scales and the other small parts of all weights, and refuse unsafe values.

    Args:
        packed: the base with packed weights.
        files: the base's weight files, by name.

    Raises:
        CheckpointError: with each part that holds a value that no quantizer writes.
    """
    base, findings = packed.stored, list[Finding]()
    with Parts(base, files) as parts:
        for weight in packed.weights.values():
            for name, check in weight.checks.items():
                info = base.tensors[name].info
                step = max(1, _READ_BYTES * 8 // BITS[info.dtype])
                for first in range(0, math.prod(info.shape), step):
                    last = min(first + step, math.prod(info.shape))
                    reason = check(parts.flat(name, first, last))
                    if reason is not None:
                        findings.append(rules.PART_VALUES.at(printable(name), reason))
                        break
    refuse(findings)


def dequantized_config(text: bytes, config: Mapping[str, object]) -> bytes:
    """Return a config's text, less the settings of the quantization.

    Args:
        text: the config's bytes.
        config: the config's value.
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


def dequantized_metadata(metadata: Mapping[str, str], packed: Unpacked) -> dict[str, str]:
    """Return the metadata of a file's header without the entries of a quantizer."""
    tensors = packed.stored.tensors.keys() | packed.weights.keys()
    return {
        key: text for key, text in metadata.items() if key != "tensor_names" and key not in tensors
    }


# --- reading parts -------------------------------------------------------------------------------


Panel = Callable[[str, int, int], Array]
"""Returns columns `first` to `last` (exclusive) of a matrix, by the matrix's name."""


def panels(base: BaseModel, files: Mapping[str, InputFile]) -> Panel:
    """Return a function that keeps the last columns that it read, for all threads.

    GPTQ and AWQ store an output of a layer as a column. Each block of outputs needs a few bytes of
    each stored row, and would read the rows again.

    Args:
        base: the base as the files hold the packed weights.
        files: the base's weight files, by name.
    """

    @lru_cache(maxsize=_MOST_PANELS)
    def read(name: str, first: int, last: int) -> Array:
        with Parts(base, files) as parts:
            found = parts.columns(name, first, last)
        found.flags.writeable = False
        return found

    return read


class Parts(ExitStack):
    """Reads ranges of the tensors of a base; a context manager that closes the files again.

    Args:
        base: the base as the files hold the packed weights.
        files: the base's weight files, by name.
        panel: reads columns in the place of this class; None if nothing is kept.
    """

    def __init__(
        self, base: BaseModel, files: Mapping[str, InputFile], panel: Panel | None = None
    ) -> None:
        super().__init__()
        self._base = base
        self._files = files
        self._panel = panel
        self._opened: dict[str, LocalFile] = {}

    def rows(self, name: str, first: int, last: int) -> Array:
        """Return rows `first` to `last` (exclusive) of a tensor, along the first axis."""
        shape = self._base.tensors[name].info.shape
        row = math.prod(shape[1:])
        return self.flat(name, first * row, last * row).reshape(last - first, *shape[1:])

    def columns(self, name: str, first: int, last: int) -> Array:
        """Return columns `first` to `last` (exclusive) of a matrix."""
        info = self._base.tensors[name].info
        (rows, columns), dtype = info.shape, NUMPY_DTYPE[info.dtype]
        if (first, last) == (0, columns):
            return self.rows(name, 0, rows)
        width = max(1, _PANEL_BYTES // (rows * dtype.itemsize))
        if self._panel is not None and last - first < width:
            found = [
                self._panel(name, start, min(start + width, columns))[
                    :, max(0, first - start) : last - start
                ]
                for start in range(first // width * width, last, width)
            ]
            return found[0] if len(found) == 1 else np.concatenate(found, axis=1)
        out = np.empty((rows, last - first), dtype)
        if (columns - (last - first)) * dtype.itemsize > _SKIPPED_BYTES:
            for row in range(rows):
                out[row] = self.flat(name, row * columns + first, row * columns + last)
            return out
        step = max(1, _READ_BYTES // (columns * dtype.itemsize))
        for row in range(0, rows, step):
            end = min(row + step, rows)
            out[row:end] = self.rows(name, row, end)[:, first:last]
        return out

    def flat(self, name: str, first: int, last: int) -> Array:
        """Return elements `first` to `last` (exclusive) of a tensor in row-major order."""
        dtype = NUMPY_DTYPE[self._base.tensors[name].info.dtype]
        return self.raw(name, first * dtype.itemsize, last * dtype.itemsize).view(dtype)

    def raw(self, name: str, first: int, last: int) -> NDArray[np.uint8]:
        """Return bytes `first` to `last` (exclusive) of a tensor."""
        tensor = self._base.tensors[name]
        start = self._base.files[tensor.file].data_start + tensor.info.start
        if tensor.file not in self._opened:
            self._opened[tensor.file] = self.enter_context(self._files[tensor.file].open())
        found: NDArray[Any] = np.empty(last - first, np.uint8)
        self._opened[tensor.file].read_into(start + first, found.data)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Computes rows of a packed weight, by any thread.

    Attributes:
        base: the base as the files hold the packed weights.
        files: the base's weight files, by name.
        weight: the weight.
        panel: reads columns of the parts, and keeps some; None if nothing is kept.
    """

    base: BaseModel
    files: Mapping[str, InputFile]
    weight: PackedWeight
    panel: Panel | None = None

    def __call__(self, first: int, last: int) -> Array:
        """Return the rows `first` to `last` (exclusive) as the library computes them."""
        with Parts(self.base, self.files, self.panel) as parts, np.errstate(all="ignore"):
            return self.weight.decode(parts, first, last)
