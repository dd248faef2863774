"""Read the LoRA in a GGUF file: metadata, factors, and llama.cpp's names of modules.

    magic, version, counts ──► metadata ──► name, sizes, type, offset of each tensor ──► data

Every length is compared with the rest of the file before memory is allocated. The package `gguf`
only translates names.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from vera_convert import rules
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import ByteSource
from vera_convert.files.tensorfile import TensorData
from vera_convert.targets.architectures import MAX_LAYERS
from vera_convert.text import printable

_MOST_HEADER = 1 << 26
_BLOCK = 1 << 20
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""The format of each scalar type of GGUF, in the words of `struct`."""
_TEXT, _ARRAY = 8, 9
_DTYPES = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
"""safetensors' name and the bytes of a value, by the number of GGML's type."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file: texts and numbers of the metadata, and the tensors by name."""

    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorData]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the base's architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def alpha(self) -> float:
        """The factor of a product, times the rank; 0 for a factor of 1."""
        found = self.metadata.get("adapter.lora.alpha", 0.0)
        return found if isinstance(found, float) else math.nan


def read_gguf(source: ByteSource) -> GgufFile:
    """Read the header of a GGUF file with a LoRA; the values of tensors are read on demand.

    Raises:
        CheckpointError: the file is malformed, holds no LoRA, or has tensors of another type.
    """
    cursor = _Cursor(source.read_at(0, min(source.size, _MOST_HEADER)), source.place)
    if cursor.take(4) != b"GGUF" or cursor.number("I") not in (2, 3):
        cursor.refuse("it is no GGUF file of version 2 or 3")
    count, pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, object] = {}
    for _ in range(cursor.bounded(pairs, 12)):
        name = cursor.text()
        if name in metadata:
            cursor.refuse(f"its metadata names {printable(name)} twice")
        metadata[name] = cursor.value(cursor.number("I"))
    kind = metadata.get("general.type"), metadata.get("adapter.type")
    if kind != ("adapter", "lora"):
        cursor.refuse("its metadata does not say that it holds a LoRA")
    infos = [cursor.tensor() for _ in range(cursor.bounded(count, 24))]
    if len({name for name, *_ in infos}) < len(infos):
        cursor.refuse("two of its tensors have the same name")
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or not 0 < step <= _BLOCK:
        cursor.refuse("its alignment is not a usable number")
    start = -(-cursor.at // step) * step
    tensors = {}
    for name, dtype, shape, offset in infos:
        tensors[name] = _tensor(source, name, dtype, shape, start + offset)
    return GgufFile(metadata, tensors)


def _tensor(
    source: ByteSource, name: str, dtype: str, shape: tuple[int, ...], start: int
) -> TensorData:
    found = TensorData(name, dtype, shape, lambda: iter(()))
    if start + found.nbytes > source.size:
        raise _unreadable(source.place, f"{printable(name)} reaches beyond its end")
    return found._replace(blocks=partial(_blocks, source, start, found.nbytes))


def _blocks(source: ByteSource, start: int, size: int) -> Iterator[bytes]:
    for at in range(0, size, _BLOCK):
        yield source.read_at(start + at, min(_BLOCK, size - at))


def _unreadable(place: str, reason: str) -> CheckpointError:
    return CheckpointError(rules.LORA_UNREADABLE.at(place, f"{reason}."))


class _Cursor:
    """Take values from the bytes of a header, in order."""

    def __init__(self, data: bytes, place: str) -> None:
        self._data = data
        self._place = place
        self.at = 0

    def refuse(self, reason: str) -> NoReturn:
        raise _unreadable(self._place, reason)

    def take(self, length: int) -> bytes:
        self.bounded(length, 1)
        self.at += length
        return self._data[self.at - length : self.at]

    def bounded(self, count: int, size: int) -> int:
        """Return a count of items of at least `size` bytes, if the rest can hold all items."""
        if count * size > len(self._data) - self.at:
            self.refuse("its header is cut off, or too large")
        return count

    def number(self, form: str) -> int:
        found: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return found

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> object:
        """Take a value of the metadata; the items of an array are skipped."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            self._skip_array(self.number("I"), self.number("Q"))
            return None
        if kind not in _SCALARS:
            self.refuse(f"its metadata has a value of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _skip_array(self, kind: int, count: int) -> None:
        if kind == _TEXT:
            for _ in range(self.bounded(count, 8)):
                self.text()
        elif kind in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        else:
            self.refuse(f"its metadata has an array of the unknown type {kind}")

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """Take name, dtype, shape and offset of a tensor."""
        name = self.text()
        sizes = [self.number("Q") for _ in range(self.bounded(self.number("I"), 8))]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in _DTYPES:
            self.refuse(
                f"{printable(name)} is of GGML's type {kind}; F32, F16 and BF16 can be read"
            )
        return name, _DTYPES[kind][0], tuple(reversed(sizes)), offset


# --- names ---------------------------------------------------------------------------------------


def gguf_package() -> Any:  # noqa: ANN401 -- the package has no types
    """Return the package `gguf`, or raise `SurroundingsError` if the package is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise SurroundingsError(
            "a GGUF file needs the package gguf. "
            "Install gguf with `pip install 'vera-convert[gguf]'`."
        ) from error


def name_table(architecture: str, layers: int) -> Any:  # noqa: ANN401 -- as above
    """Return the package's table of names; None if the package does not know the architecture.

    Args:
        architecture: llama.cpp's name of the architecture.
        layers: the number of layers.

    Raises:
        SurroundingsError: the package `gguf` is not installed.
    """
    gguf = gguf_package()
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], layers) if architecture in known else None


def gguf_names(
    architecture: str, stored: Iterable[str], candidates: Mapping[str, Iterable[str]]
) -> dict[str, str]:
    """Return llama.cpp's name for each module of the architecture.

    Args:
        architecture: llama.cpp's name of the architecture.
        stored: the names in the file, which tell the number of layers.
        candidates: possible names in the base's files, by module.

    Raises:
        SurroundingsError: the package `gguf` is not installed.
    """
    found = (re.match(r"blk\.(\d{1,6})\.", name) for name in stored)
    last = max((int(each[1]) for each in found if each is not None), default=0)
    table = name_table(architecture, last + 1) if last < MAX_LAYERS else None
    if table is None:
        return {}
    names = {
        module: next((own for name in names if (own := table.get_name(name))), None)
        for module, names in candidates.items()
    }
    return {module: own for module, own in names.items() if own is not None}
