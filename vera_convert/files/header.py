"""The header of a safetensors file: read as records, and written as the library writes it.

The format: eight bytes with the length of the header, little-endian; the header, a JSON object with
one entry for each tensor (dtype, shape, and the first and last offset in the data) and texts under
``__metadata__``; then the data, the tensors' bytes without a gap.

Reading is as strict as the safetensors library, and stricter if two readers could otherwise see two
different files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

from vera_convert import rules
from vera_convert.dtypes import BITS
from vera_convert.errors import CheckpointError
from vera_convert.files.reading import ByteSource
from vera_convert.files.strict_json import FOREIGN, json_kind, parse_json
from vera_convert.rules import Finding, Rule
from vera_convert.text import printable

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}

MAX_HEADER_BYTES = 100_000_000
_FIRST_READ = 32 << 10  # most headers of an adapter fit, so a remote header costs a single request
_MOST_FINDINGS = 50
_MOST_DIMENSIONS = 32  # NumPy 1 has no more
_LONGEST_NAME, _DEEPEST_NAME = 1_000, 100
_METADATA_KEY = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


class Entry(Protocol):
    """A tensor of a header, without the offsets."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def dtype(self) -> str:
        """The safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def nbytes(self) -> int:
        """The number of bytes."""


class TensorInfo(NamedTuple):
    """One tensor of a header; `start` and `end` are offsets into the data part.

    A named tuple, because a header can have 100,000 and a dataclass takes longer to create.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a file before the data.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: the texts under ``__metadata__``; empty if there are none.
        raw: the bytes of the file before the data, with the length of the header.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """Where the data part begins in the file."""
        return len(self.raw)

    @property
    def file_size(self) -> int:
        """The size of the file in bytes: tensors leave no gap in the data."""
        return self.data_start + sum(info.nbytes for info in self.tensors.values())


# --- reading a header ----------------------------------------------------------------------------


def read_header(source: ByteSource) -> Header:
    """Read the header of a safetensors file, in one or two reads.

    Raises:
        CheckpointError: with every defect of the header, fifty at most.
        SurroundingsError: the file cannot be read, or changed meanwhile.
    """
    raw = _read_raw(source)
    source.check_unchanged()
    defects = _Defects(source.place)
    duplicates: list[Finding] = []
    try:
        document, plain = _parsed(raw[8:], f"{source.place} header", duplicates)
    except CheckpointError as error:
        found = (replace(each, file=source.place) for each in error.findings)
        raise CheckpointError.of(found) from error
    defects.findings = [replace(each, file=source.place) for each in duplicates]
    metadata = _metadata(document.pop(_METADATA_KEY, {}), defects)
    tensors = _tensors(document, defects) + plain
    for info in tensors:
        if len(info.name) > _LONGEST_NAME or info.name.count(".") > _DEEPEST_NAME:
            reason = f"its {len(info.name):,} letters have {info.name.count('.'):,} dots."
            defects.add(rules.TENSOR_NAME_ABSURD, reason, info.name)
    for info in plain:
        for rule, reason in _wrong_size(info):
            defects.add(rule, reason, info.name)
    defects.raise_any()
    _check_layout(tensors, source.size - len(raw), defects)
    defects.raise_any()
    return Header({info.name: info for info in tensors}, metadata, raw)


class _Defects:
    """The findings of one header; only the first fifty are kept."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.findings: list[Finding] = []
        self.more = 0

    def add(self, rule: Rule, reason: str, tensor: str | None = None) -> None:
        if len(self.findings) >= _MOST_FINDINGS:
            self.more += 1
            return
        if tensor is None:
            self.findings.append(rule.in_file(self.place, reason))
        else:
            self.findings.append(rule.in_tensor(tensor, reason, file=self.place))

    def raise_any(self) -> None:
        if not self.findings:
            return
        if self.more:
            *kept, last = self.findings
            reason = f"{last.reason} ({self.more:,} more defects of this header are not listed.)"
            self.findings = [*kept, replace(last, reason=reason)]
        raise CheckpointError.of(self.findings)


def _read_raw(source: ByteSource) -> bytes:
    """Return the bytes of length and header, after a comparison with the file's size."""
    if source.size == 0:
        raise CheckpointError(rules.FILE_EMPTY.in_file(source.place, "has no bytes."))
    if source.size < 8:
        reason = f"has {source.size} bytes only."
        raise CheckpointError(rules.LENGTH_MISSING.in_file(source.place, reason))
    raw = source.read_at(0, min(source.size, _FIRST_READ))
    length = int.from_bytes(raw[:8], "little")
    end = 8 + length
    if end > source.size or length > MAX_HEADER_BYTES:
        _refuse_length(source, raw, length)
    if raw[8:9] != b"{" or not length:
        found = f"begins with {printable(repr(raw[8:9])[1:])}." if length else "has no bytes."
        raise CheckpointError(rules.HEADER_START.in_file(source.place, f"the header {found}"))
    if end > len(raw):
        raw += source.read_at(len(raw), end - len(raw))
    return raw[:end]


_MAGIC: Mapping[bytes, tuple[Rule, str]] = {
    **FOREIGN,
    b"PK\x03\x04": (rules.PICKLE_RENAMED, "a zip archive, as torch.save writes it"),
    **{b"\x80%c" % protocol: (rules.PICKLE_RENAMED, "a pickle") for protocol in range(2, 6)},
    b"GGUF": (rules.OTHER_FORMAT, "a GGUF file"),
    b"\x89HDF": (rules.OTHER_FORMAT, "an HDF5 file"),
    b"\x93NUMPY": (rules.OTHER_FORMAT, "a NumPy array"),
    b"{": (rules.OTHER_FORMAT, "JSON text"),
}


def _refuse_length(source: ByteSource, raw: bytes, length: int) -> None:
    """Raise an error for an impossible length, which other formats show if read as safetensors."""
    claim = f"the length of the header is given as {length:,} bytes"
    if length <= MAX_HEADER_BYTES:
        reason = f"{claim}, but the file has {source.size:,} bytes."
        raise CheckpointError(rules.HEADER_CUT_OFF.in_file(source.place, reason))
    for magic, (rule, what) in _MAGIC.items():
        if raw.startswith(magic):
            raise CheckpointError(rule.in_file(source.place, f"is {what}."))
    raise CheckpointError(rules.HEADER_TOO_LONG.in_file(source.place, f"{claim}."))


_NUMBER = "(0|[1-9][0-9]{0,17})"
_PLAIN_ENTRY = re.compile(
    r', ?"([^"\\\x00-\x1f]*+)": ?\{"dtype": ?"([A-Z0-9_]++)", ?"shape": ?\[([0-9, ]*+)\],'
    rf' ?"data_offsets": ?\[{_NUMBER}, ?{_NUMBER}\]\}}'
)
_SHAPE = re.compile(f"(?:{_NUMBER}(?:, ?{_NUMBER}){{,{_MOST_DIMENSIONS - 1}}})?")
_MOST_PLAIN = 500_000


def _parsed(
    data: bytes, place: str, duplicates: list[Finding]
) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Return the JSON object of a header, and the plain entries at the end as records.

    Nearly every header ends in entries of the same form. A regular expression reads these in half
    the time of the JSON parser, which then parses only the rest.
    """
    head, plain = _cut_plain(data)
    if plain:
        try:
            document: Any = parse_json(head, place=place)
        except CheckpointError:
            document = None  # the complete text shows the defect
        names = {info.name for info in plain}
        if document and len(names) == len(plain) and names.isdisjoint({*document, _METADATA_KEY}):
            return document, plain
    document = parse_json(data, place=place, duplicates=duplicates)
    return document, []


def _cut_plain(data: bytes) -> tuple[bytes, list[TensorInfo]]:
    """Return the text without the plain entries at the end, and the plain entries as records."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data, []
    if text.count('"dtype"') > _MOST_PLAIN:
        return data, []
    head, *pieces = _PLAIN_ENTRY.split(text)
    between, last = pieces[5:-1:6], pieces[-1:]
    if any(between) or "".join(last).rstrip(" \t\r\n") != "}":
        return data, []
    shapes = {*pieces[2::6]}
    if not all(map(_SHAPE.fullmatch, shapes)) or not {*pieces[1::6]} <= BITS.keys():
        return data, []
    sizes = {shape: tuple(map(int, shape.split(","))) if shape else () for shape in shapes}
    columns = zip(*(pieces[field::6] for field in range(5)), strict=True)
    plain = [TensorInfo(n, d, sizes[s], int(a), int(b)) for n, d, s, a, b in columns]
    if any(info.start > info.end for info in plain):
        return data, []
    return f"{head}}}".encode(), plain


def _metadata(value: object, defects: _Defects) -> dict[str, str]:
    if not isinstance(value, dict):
        defects.add(rules.METADATA_FORM, f"{_METADATA_KEY} is {json_kind(value)}.")
        return {}
    for key, text in value.items():
        if not isinstance(text, str):
            reason = f'its key "{printable(key)}" has {json_kind(text)} as value.'
            defects.add(rules.METADATA_FORM, reason)
    return value


def _tensors(document: Mapping[str, Any], defects: _Defects) -> list[TensorInfo]:
    """Return the entries with sound fields, and add the defects of fields and sizes."""
    tensors = []
    for name, entry in document.items():
        found = [*_wrong_fields(entry)]
        if not found:
            info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            tensors.append(info)
            found = [*_wrong_size(info)]
        for rule, reason in found:
            defects.add(rule, reason, name)
    return tensors


def _wrong_fields(entry: object) -> Iterator[tuple[Rule, str]]:
    """Yield each defect of the fields of an entry."""
    if not isinstance(entry, dict):
        yield rules.ENTRY_FORM, f"is {json_kind(entry)}."
        return
    if entry.keys() != _FIELDS:
        for field in sorted(_FIELDS - entry.keys()):
            yield rules.ENTRY_FIELD_MISSING, f"has no {field}."
        for field in [key for key in entry if key not in _FIELDS][:1]:
            yield rules.ENTRY_FIELD_UNKNOWN, f'has the field "{printable(field)}".'
    dtype, shape = entry.get("dtype", "U8"), entry.get("shape", [])
    if not isinstance(dtype, str) or dtype not in BITS:
        yield rules.DTYPE_UNKNOWN, f"its dtype is {_text(dtype)}."
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        yield rules.SHAPE_FORM, f"its shape is {_text(shape)}."
    offsets = entry.get("data_offsets", [0, 0])
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        yield rules.OFFSETS_FORM, f"its data_offsets are {_text(offsets)}."


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Return whether a JSON value is a list of whole numbers from 0 up, without booleans."""
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110 - a generator would take three times as long
        if type(item) is not int or item < 0:
            return False
    return True


def _text(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def _wrong_size(info: TensorInfo) -> Iterator[tuple[Rule, str]]:
    """Yield a reason if a span is invalid, or has another size than shape and dtype need."""
    bits = math.prod(info.shape) * BITS[info.dtype]
    if bits == info.nbytes * 8 and 0 < bits < 1 << 63:
        return
    shape = "x".join(map(str, info.shape))
    # An empty tensor can have huge dimensions: the product overflows before the 0 is met.
    if math.prod(size or 1 for size in info.shape) * BITS[info.dtype] >= 1 << 63:
        yield rules.SHAPE_OVERFLOW, f"its shape is {printable(shape)}."
    elif bits % 8:
        yield rules.SHAPE_PARTIAL_BYTE, f"{shape} values of {info.dtype} are {bits:,} bits."
    elif bits != info.nbytes * 8:
        needed = f"{shape or 'one'} {info.dtype} needs {bits // 8:,} bytes"
        yield rules.OFFSETS_SPAN, f"{needed}, its data_offsets span {info.nbytes:,}."


def _check_layout(tensors: Sequence[TensorInfo], size: int, defects: _Defects) -> None:
    """Require tensors that fill the data part of `size` bytes, free of overlaps and gaps."""
    end, last = 0, ""
    for info in sorted(tensors, key=attrgetter("start", "end")):
        if info.start != end:
            before = f'"{printable(last)}" ends' if last else "the data begins"
            reason = f"begins at byte {info.start:,}; {before} at byte {end:,}."
            rule = rules.DATA_OVERLAP if info.start < end else rules.DATA_HOLE
            defects.add(rule, reason, info.name)
        if info.end >= end:
            end, last = info.end, info.name
    sizes = f"the tensors take {end:,} bytes, the file has {size:,} for them."
    if end != size:
        defects.add(rules.DATA_CUT_OFF if end > size else rules.DATA_TRAILING, sizes)


# --- writing a header ----------------------------------------------------------------------------


def header_bytes(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes before the data: the header and its length, as safetensors writes.

    Tensors stand by dtype (the widest first) and name, metadata by key, JSON without spaces, padded
    to eight bytes. Empty metadata has no entry.

    Raises:
        ValueError: two tensors have the same name.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors have the same name")
    entries = []
    if metadata:
        entries.append(f'"{_METADATA_KEY}":{_compact(dict(sorted(metadata.items())))}')
    start = 0
    for tensor in in_order(tensors):
        end = start + tensor.nbytes
        # A string for each entry: the json module takes a second for 100,000 tensors.
        shape = ",".join(map(str, tensor.shape))
        fields = f'{{"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}'
        entries.append(f"{_compact(tensor.name)}:{fields}")
        start = end
    header = ("{" + ",".join(entries) + "}").encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_E = TypeVar("_E", bound=Entry)


def in_order(tensors: Iterable[_E]) -> list[_E]:
    """Return tensors in the order of a file: the widest dtype first, then by name."""
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.name))
