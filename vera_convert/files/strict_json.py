"""Parse strict JSON: refuse any text that two readers could understand in two ways."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn

from vera_convert import rules
from vera_convert.errors import CheckpointError, refuse
from vera_convert.files.reading import ByteSource, too_large
from vera_convert.rules import Finding, Rule
from vera_convert.text import printable

_DEEPEST = 64
_MOST_VALUES = 4_000_000
_MOST_QUOTES = 1_000_000
_LONGEST_NUMBER = 64
_LONGEST_IN_PYTHON = 4300
"""The most digits of an integer for Python's json; the time grows with its square."""
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Floats that JSON lacks, under the names that Python's json and transformers write."""
_MOST_FINDINGS = 50

# The structure of JSON, with one kind of bracket; all other bytes are deleted.
_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
FOREIGN: Mapping[bytes, tuple[Rule, str]] = {
    b"version https://git-lfs": (rules.LFS_POINTER, "a Git LFS pointer"),
    b"\x1f\x8b": (rules.OTHER_FORMAT, "compressed with gzip"),
    b"\x28\xb5\x2f\xfd": (rules.OTHER_FORMAT, "compressed with zstandard"),
    b"<": (rules.OTHER_FORMAT, "a web page"),
}
"""The first bytes of files that a download leaves in place of another file."""
_OF_ARCHIVES = {b"PK\x03\x04": (rules.OTHER_FORMAT, "a zip archive")}
_COMMENT = re.compile(r"//|/\*|#")
_NO_STRUCTURE = bytes(sorted(set(range(256)) - set(b'"{}[],')))
_ALL_ONES = bytes.maketrans(b"0123456789", b"1" * 10)


def read_json(
    source: ByteSource, *, limit: int, pythons_numbers: bool = False
) -> tuple[object, bytes]:
    """Read a JSON file of at most `limit` bytes, and return the value and the bytes.

    Raises:
        CheckpointError: too large, empty, or JSON with a defect that `parse_json` names.
        SurroundingsError: the file cannot be read, or changed meanwhile.
    """
    if source.size > limit:
        raise CheckpointError(too_large(source, limit))
    if source.size == 0:
        raise CheckpointError(rules.FILE_EMPTY.in_file(source.place, "has no bytes."))
    data = source.read_at(0, source.size)
    source.check_unchanged()
    return parse_json(data, place=source.place, pythons_numbers=pythons_numbers), data


def parse_json(
    data: bytes,
    *,
    place: str,
    duplicates: list[Finding] | None = None,
    pythons_numbers: bool = False,
) -> object:
    """Parse strict JSON: refuse any text that two readers could understand in two ways.

    Refused are a byte order mark, duplicate keys, NaN and Infinity, numbers that are absurdly long
    or overflow, unpaired surrogates, more than 64 levels, and more than four million values.

    transformers and PEFT write and read configs with Python's json. For configs,
    `pythons_numbers` accepts all numbers of Python's json: ``NaN``, ``Infinity``,
    ``-Infinity``, ``1e400`` (infinity), ``-0``, and up to 4,300 digits. Every NaN is the one object
    `math.nan`, so two equal configs compare as equal.

    Args:
        data: the text as UTF-8.
        place: the name for messages.
        duplicates: receives a finding for each duplicate key; if None, the findings are raised.
        pythons_numbers: accept each number that Python's json accepts.

    Raises:
        CheckpointError: with line and column, if known.
    """
    for magic, (rule, what) in {**FOREIGN, **_OF_ARCHIVES}.items():
        if data.startswith(magic):
            raise CheckpointError(rule.in_file(place, f"is {what}."))
    text = _decoded(data, place)
    _check_structure(data, place)
    hooks = (_PythonsNumbers if pythons_numbers else _Hooks)(place)
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=hooks.make_object,
            parse_int=hooks.make_integer if _has_odd_integer(data) else int,
            parse_float=hooks.make_float,
            parse_constant=hooks.make_constant,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        found = rules.JSON_SYNTAX.in_file(place, f"{where}: {error.msg}.")
        if _COMMENT.match(text, error.pos):
            found = rules.JSON_SYNTAX.in_file(place, f"{where}: a comment, which JSON cannot have.")
            if place.endswith(".json"):  # nobody edits the header of a safetensors file
                found = found.with_remedy("Remove the comments.")
        raise CheckpointError(found) from None
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        _check_surrogates(value, place)
    if duplicates is not None:
        duplicates += hooks.duplicates
    else:
        refuse(hooks.duplicates)
    return value


_KINDS = {str: "a text", list: "a list", dict: "an object", type(None): "null"}


def json_kind(value: object) -> str:
    """Return the kind of a JSON value in words: ``a text``, or ``true`` for True itself."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _KINDS.get(type(value), "a number")


def _decoded(data: bytes, place: str) -> str:
    if data.startswith(codecs.BOM_UTF8):
        raise CheckpointError(rules.JSON_BOM.in_file(place, "begins with the bytes EF BB BF."))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start:,} (0x{data[error.start]:02X}) is not UTF-8."
        raise CheckpointError(rules.JSON_NOT_UTF8.in_file(place, reason)) from None


def _check_structure(data: bytes, place: str) -> None:
    """Refuse a text that would exhaust the parser, before parsing and in linear time.

    The check first removes escapes, then empty strings, then all strings, so the content of strings
    does not count.
    """
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    bare = bare.translate(_ONE_BRACKET, _NO_STRUCTURE).replace(b'""', b"")
    if bare.count(b'"') > _MOST_QUOTES:
        raise CheckpointError(
            rules.JSON_TOO_MANY.in_file(place, "has millions of texts full of brackets.")
        )
    outside = b"".join(bare.split(b'"')[::2])
    if len(outside) > _MOST_VALUES:
        reason = f"has {len(outside):,} brackets and commas; the limit is {_MOST_VALUES:,}."
        raise CheckpointError(rules.JSON_TOO_MANY.in_file(place, reason))
    import numpy as np  # here, since --help reads no JSON

    brackets = np.frombuffer(outside.replace(b",", b""), np.int8)
    steps = np.where(brackets == ord("["), np.int8(1), np.int8(-1))
    depth = int(steps.cumsum(dtype=np.int32).max(initial=0))
    if depth > _DEEPEST:
        raise CheckpointError(
            rules.JSON_NESTING.in_file(place, f"has {depth:,} levels; the limit is {_DEEPEST}.")
        )


def _has_odd_integer(data: bytes) -> bool:
    """Return whether an integer may need the strict parser; a check of each is twice as slow."""
    return b"-0" in data or b"1" * _LONGEST_NUMBER in data.translate(_ALL_ONES)


class _Hooks:
    """Callbacks of the JSON parser, which refuse everything on which JSON readers disagree."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.duplicates: list[Finding] = []

    def make_object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs) and len(self.duplicates) < _MOST_FINDINGS:
            last = {key: place for place, (key, _) in enumerate(pairs)}
            twice = next(key for place, (key, _) in enumerate(pairs) if last[key] != place)
            reason = f'the key "{printable(twice)}" stands twice in one object.'
            self.duplicates.append(rules.JSON_DUPLICATE_KEY.in_file(self.place, reason))
        return made

    def make_integer(self, digits: str) -> int:
        # "-0" is the integer 0 to Python and the float -0.0 to serde.
        if len(digits) > _LONGEST_NUMBER or digits == "-0":
            self._refuse_number(digits)
        return int(digits)

    def make_float(self, digits: str) -> float:
        value = float(digits)
        if len(digits) > _LONGEST_NUMBER or math.isinf(value):
            self._refuse_number(digits)
        return value

    def _refuse_number(self, digits: str) -> NoReturn:
        shown = digits if len(digits) <= 24 else f"{digits[:20]}… ({len(digits):,} characters)"
        raise CheckpointError(rules.JSON_NUMBER.in_file(self.place, f"holds the number {shown}."))

    def make_constant(self, name: str) -> float:
        raise CheckpointError(rules.JSON_NOT_FINITE.in_file(self.place, f"holds {name}."))


class _PythonsNumbers(_Hooks):
    """Callbacks that accept the numbers of Python's json, within Python's limit of digits."""

    def make_integer(self, digits: str) -> int:
        if len(digits.lstrip("-")) > _LONGEST_IN_PYTHON:
            self._refuse_number(digits)
        try:
            return int(digits)
        except ValueError:  # the user lowered the limit with PYTHONINTMAXSTRDIGITS
            self._refuse_number(digits)

    def make_float(self, digits: str) -> float:
        if len(digits) > _LONGEST_IN_PYTHON:
            self._refuse_number(digits)
        return float(digits)

    def make_constant(self, name: str) -> float:
        return NOT_FINITE[name]


def _check_surrogates(value: object, place: str) -> None:
    for text in _texts(value):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            reason = f'the text "{printable(text)}" has an unpaired surrogate.'
            raise CheckpointError(rules.JSON_SURROGATE.in_file(place, reason))


def _texts(value: object) -> Iterator[str]:
    """Yield every key and text inside a JSON value."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
